"""A step as one CUDA graph, on a machine without CUDA: a stand-in records and replays it as a graph would."""

import contextlib
import copy
import csv
from types import SimpleNamespace

import pytest
import torch
from conftest import AFFORDS, STAGE1, STAGE2, call, flat, log_of
from scipy.stats import spearmanr
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dia_lib
import evaluate
import train_dia
import train_diffusion
from dia_lib import Step


FORBIDDEN = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "is_pinned", "_pin_memory")


class Graph(TorchDispatchMode):
    """What torch.cuda.graph(self) does: within the block each operation is kept with the memory that it reads
    and writes, and computes nothing in the end; replay() does all of them again, in the same memory.

    Raises where a value would cross between host and device. It knows nothing of streams, of memory that is
    given back and used again, nor of other threads.
    """

    made = []

    def __init__(self):
        super().__init__()
        self.made.append(self)
        self.tape, self.before, self.replays = [], [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, tensors = function.overloadpacket.__name__, [x for x in tree_leaves(args) if torch.is_tensor(x)]
        by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:])
        if name in FORBIDDEN or by_mask:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        written = [value for value, argument in zip(args, function._schema.arguments, strict=False)
                   if argument.alias_info and argument.alias_info.is_write]
        if name == "native_batch_norm":                             # its schema hides the running statistics
            written += args[3:5]
        self.before += [(x, x.clone()) for x in tree_leaves(written) if isinstance(x, torch.Tensor)]
        out = function(*args, **(kwargs or {}))
        self.tape.append((function, args, kwargs or {}, out))
        return out

    @contextlib.contextmanager
    def record(self):
        with self:
            yield
        for x, value in reversed(self.before):                  # recording has changed nothing
            x.detach().copy_(value)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, out in self.tape:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """CUDA as far as Step needs it; the list of the graphs that are made."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"CUDAGraph": Graph, "graph": lambda graph, stream: graph.record(),
                        "Stream": lambda device: stream, "current_stream": lambda: stream,
                        "stream": lambda stream: contextlib.nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(Graph, "made", [])
    return Graph.made


def test_a_graph_bakes_numbers_in_and_reads_tensors_anew(graphs):
    """So the stand-in finds what a graph would get wrong: a number of the call that was recorded stays."""
    factor, total = SimpleNamespace(number=1.0), torch.zeros(())

    def function(x, y):
        total.add_(x)
        return [total + 0, y * factor.number]

    step, found = Step(function, torch.device("cpu"), graph=True), []
    for i in range(1, 8):
        factor.number = float(i)
        found.append([x.item() for x in step(torch.tensor(float(i)), torch.tensor(1.0))])
    assert [a for a, _ in found] == [1, 3, 6, 10, 15, 21, 28]
    assert [b for _, b in found] == [1, 2, 3, 4, 4, 4, 4]
    assert graphs[0].replays == 4


def marked(x):
    y = x.clone()
    y[torch.arange(len(x))] = 1
    return [y]


@pytest.mark.parametrize("function", [
    marked, lambda x: [x * x.item()], lambda x: [x[x > 0]], lambda x: [x * torch.tensor(2.0)]])
def test_what_a_graph_cannot_hold(function, graphs):
    """Read by the host, of a size that depends on values, made on the host: the fourth call raises."""
    step = Step(function, torch.device("cpu"), graph=True)
    for _ in range(3):
        step(torch.ones(1))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        step(torch.ones(1))


def test_a_checkpoint_is_written_when_it_costs_little(tmp_path, monkeypatch):
    """The first one always, then when 50 times its seconds have passed."""
    monkeypatch.setattr(dia_lib.Log, "affords", AFFORDS)
    clock = iter([0.0, 0.0, 5.0, 10.0, 12.0, 111.9, 112.0])
    monkeypatch.setattr(dia_lib.time, "perf_counter", lambda: next(clock))
    log = dia_lib.Log(tmp_path, "dia")
    assert log.affords()                                                    # at 5
    with log.saving():                                                      # from 10 to 12
        pass
    assert [log.affords(), log.affords()] == [False, True]                  # 50 times 2 seconds later


def test_what_is_compiled_and_what_recorded():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert dia_lib.launches(None, 19999, cuda) == dia_lib.launches(None, 10 ** 6, cpu) == (False, False)
    assert dia_lib.launches(None, 20000, cuda) == dia_lib.launches("compile", 1, cpu) == (True, False)
    assert dia_lib.launches("graph", 10 ** 6, cuda) == (False, True)
    assert dia_lib.launches("both", 1, cuda) == (True, True)


def test_what_a_graph_returns_is_kept(graphs):
    """The next replay writes over the graph's own outputs."""
    step = Step(lambda x: [x * 2], torch.device("cpu"), graph=True)
    kept = [step(torch.tensor(float(i)))[0] for i in range(8)]
    assert torch.stack(kept).tolist() == [2 * i for i in range(8)]


@pytest.mark.parametrize("module, kind, flags", [
    (train_diffusion, "diffusion", STAGE1), (train_dia, "dia", STAGE2),
    (train_dia, "dia", [*STAGE2, "--twins", "excluded", "--shift", "perm"]),
    *((train_dia, "dia", [*STAGE2, "--dissolve", by]) for by in ("none", "gaussian", "median", "resize"))])
def test_a_run_by_graphs_is_an_eager_one(module, kind, flags, graphs, chain, folder, tmp_path, monkeypatch):
    """Weights, average, optimizer and log, bit for bit, over 8 steps with a report after each second one."""
    def kept(out):
        def save(path, kind, settings, state):
            states[out].append(copy.deepcopy(flat(state)))
            dia_lib.save_checkpoint(path, kind, settings, state)
        return save

    states = {"eager": [], "graph": []}
    flags = ["--data", folder, *flags, "--steps", 8, "--device", "cpu"]
    flags += ["--diffusion", chain / "diffusion.pt"] if kind == "dia" else []
    assert "need an NVIDIA GPU" in call(module, *flags, "--out", tmp_path / "no", "--launch", "graph")
    monkeypatch.setattr(module, "launches", lambda name, steps, device: (False, name == "graph"))
    for out, more in (("eager", []), ("graph", ["--launch", "graph"])):
        monkeypatch.setattr(module, "save_checkpoint", kept(out))
        assert call(module, *flags, *more, "--out", tmp_path / out) is None
    assert [graph.replays for graph in graphs] == [5]
    assert len(states["eager"]) == len(states["graph"]) == 4
    for a, b in zip(states["eager"], states["graph"], strict=True):
        assert a.keys() == b.keys()
        for k in a:
            assert torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k], k
    assert log_of(tmp_path / "eager") == log_of(tmp_path / "graph")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@needs_gpu
@pytest.mark.parametrize("module, flags", [(train_diffusion, STAGE1), (train_dia, STAGE2)])
def test_on_a_gpu_the_losses_are_those_of_an_eager_run(module, flags, chain, folder, tmp_path, monkeypatch):
    """The first 20 of 40 steps in float32, within 1e-4 of their size."""
    class Kept(Step):
        def __call__(self, *inputs):
            outputs = super().__call__(*inputs)
            losses[self.graph is not None].append(outputs[0].flatten()[0])
            return outputs

    losses = {False: [], True: []}
    monkeypatch.setattr(dia_lib, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(module, "Step", Kept)
    flags = ["--data", folder, *flags, "--steps", 40, "--device", "cuda"]
    flags += ["--diffusion", chain / "diffusion.pt"] if module is train_dia else []
    for launch in ("eager", "graph"):
        assert call(module, *flags, "--launch", launch, "--out", tmp_path / launch) is None
    eager, graph = (torch.stack(losses[kind][:20]) for kind in (False, True))
    assert len(losses[True]) == 40 and ((eager - graph) / eager).abs().max() < 1e-4


@needs_gpu
def test_a_gpu_ranks_test_images_as_the_cpu_does(own_chain, monkeypatch):
    """The scores of one checkpoint in float32: rank correlation above 0.999."""
    monkeypatch.setattr(dia_lib, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    scores = []
    for device in ("cpu", "cuda"):
        (own_chain / "stats.pt").unlink()
        assert call(evaluate, "--out", own_chain, "--device", device) is None
        scores.append([float(row["score"]) for row in csv.DictReader((own_chain / "scores.csv").open())])
    assert spearmanr(*scores).statistic > 0.999
