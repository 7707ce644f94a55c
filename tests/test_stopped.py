"""Runs that are stopped: killed at random moments, by SIGTERM, by a full disk. Nothing older is lost.

Real processes are killed. They are forks of one process that has imported torch and not computed anything, so
that each starts in milliseconds.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, STAGE1, STAGE2, call, flat, log_of

import dia_lib
import train_diffusion

FORKS = """
import json, os, resource, sys
sys.path.insert(0, sys.argv[1])
import dia_lib, train_dia, train_diffusion
dia_lib.Log.affords = lambda self: True                             # however slow the disk is
print("ready", flush=True)
while line := sys.stdin.readline():
    script, output, limit, *argv = json.loads(line)
    if not (pid := os.fork()):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.argv, code = [script, *argv], 0
        try:
            dia_lib.run({"train_dia": train_dia, "train_diffusion": train_diffusion}[script].main)
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):
                print(code)
                code = 1
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        os._exit(code or 0)
    print(pid, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """fork(script, *argv, kill=(signal, seconds), limit=bytes a file): exit code, output, seconds it ran."""
    script = tmp_path_factory.mktemp("forks") / "forks.py"
    script.write_text(FORKS)
    process = subprocess.Popen([sys.executable, str(script), str(ROOT)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout.readline() == "ready\n"

    def run(name, *argv, kill=None, limit=0):
        output = script.with_name("output")
        output.write_text("")
        process.stdin.write(json.dumps([name, str(output), limit, *map(str, argv)]) + "\n")
        process.stdin.flush()
        pid, begun = int(process.stdout.readline()), time.perf_counter()
        if kill:
            time.sleep(kill[1])
            os.kill(pid, kill[0])           # not waited for yet: no other process can have its number
        process.stdin.write("\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        return code, output.read_text(), time.perf_counter() - begun

    yield run
    process.stdin.close()
    process.wait()


def ends(out, kind):
    """All that a finished run's checkpoint holds, by name, and its log without seconds."""
    return flat(torch.load(out / f"{kind}.pt", weights_only=True)), log_of(out)


@pytest.mark.parametrize("script, kind", [("train_diffusion", "diffusion"), ("train_dia", "dia")])
def test_ten_kills_at_random_moments_change_nothing(script, kind, folder, tmp_path, fork):
    """SIGKILL at ten moments or more of runs that are started again with --resume, at least three times from
    a checkpoint: the ends are those of one never stopped."""
    argv = ["--data", folder, *(STAGE1 if kind == "diffusion" else STAGE2), "--holdout", "0", "--resume"]
    if kind == "dia":
        assert fork("train_diffusion", *argv[:2], "--out", tmp_path / "stage1", *STAGE1, *argv[-3:-1])[0] == 0
        argv += ["--diffusion", tmp_path / "stage1/diffusion.pt", "--save-every", 2]
    code, output, seconds = fork(script, *argv, "--out", tmp_path / "never")
    assert code == 0, output
    weights, log = ends(tmp_path / "never", kind)
    rng, kills, resumed, runs = random.Random(0), 0, 0, 0
    while kills < 10 or resumed < 3:
        out, runs, code = tmp_path / f"run{runs}", runs + 1, -signal.SIGKILL
        while code == -signal.SIGKILL:
            resumed += (out / f"{kind}.pt").exists()
            wanted = kills < 10 or resumed < 3
            kill = (signal.SIGKILL, rng.uniform(0.02, 1) * seconds) if wanted else None
            code, output, _ = fork(script, *argv, "--out", out, kill=kill)
            kills += code == -signal.SIGKILL
        assert code == 0, output
        again, log_again = ends(out, kind)
        assert again.keys() == weights.keys() and log_again == log
        for k, v in weights.items():
            assert torch.equal(v, again[k]) if torch.is_tensor(v) else v == again[k], k
        assert runs < 30


def test_sigterm_ends_with_a_sentence_and_leaves_no_half_file(folder, tmp_path, fork):
    argv = ["--data", folder, *STAGE1, "--steps", 2000, "--out", tmp_path / "run"]
    code, output, _ = fork("train_diffusion", *argv, kill=(signal.SIGTERM, 3))
    assert code == 128 + signal.SIGTERM and "goes on from its last checkpoint with --resume" in output
    assert "Traceback" not in output and not list((tmp_path / "run").glob("*.tmp"))


def test_a_full_disk_ends_with_a_sentence_and_loses_nothing(folder, tmp_path, fork, monkeypatch):
    """RLIMIT_FSIZE stands for the full disk: the next checkpoint can't be written, the last one is whole."""
    def save_then_stop(*args):
        dia_lib.save_checkpoint(*args)
        raise KeyboardInterrupt

    out = tmp_path / "run"
    argv = ["--data", folder, *STAGE1, "--holdout", "0", "--out", out, "--steps", 8]
    monkeypatch.setattr(train_diffusion, "save_checkpoint", save_then_stop)
    assert call(train_diffusion, *argv) == 128 + signal.SIGINT
    before = (out / "diffusion.pt").read_bytes()
    with open(out / "log.jsonl", "a") as log:               # as if stopped after 1000 seconds
        log.write('{"stage": "diffusion", "step": 2, "seconds": 1000.0}\n')
    code, output, _ = fork("train_diffusion", *argv[:2], "--out", out, "--resume", limit=len(before) // 2)
    last = output.strip().splitlines()[-1]
    assert code == 1 and "diffusion.pt" in last and "Nothing that was written before is lost" in last, output
    assert torch.load(out / "diffusion.pt", weights_only=True)["step"] == 2 and not list(out.glob("*.tmp"))
    assert fork("train_diffusion", *argv[:2], "--out", out, "--resume")[0] == 0
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["seconds"] for row in rows if "seconds" in row][-1] > 1000      # they go on counting


def test_an_out_below_a_file_is_one_sentence(folder, tmp_path):
    (tmp_path / "file").write_text("")
    out = ["--out", tmp_path / "file/run"]
    assert "Not a directory" in call(train_diffusion, "--data", folder, *STAGE1, *out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_sentence(folder, tmp_path):
    tmp_path.chmod(0o555)
    assert "Permission denied" in call(train_diffusion, "--data", folder, *STAGE1, "--out", tmp_path / "run")
