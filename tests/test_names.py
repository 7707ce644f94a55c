"""Sets by name: downloads from a server on 127.0.0.1 that misbehaves, and the four sets fetched by hand, in their own layouts."""

import hashlib
import http.server
import threading

import numpy as np
import pytest
from conftest import STAGE1, call, texture
from PIL import Image
from test_data import medmnist

import dia_data
import train_diffusion
from dia_data import load_data


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of breastmnist.npz; `server.faults` names what goes wrong with each request in turn."""
    body = medmnist(tmp_path / "file.npz").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            served.requests.append(self.path)
            fault = served.faults.pop(0) if served.faults else ""
            if fault == "404":
                return self.send_error(404)
            if fault == "elsewhere":
                self.send_response(302)
                self.send_header("Location", "http://example.invalid/file.npz")
                return self.end_headers()
            self.send_response(200)
            self.send_header("Content-Length", "99999999999999" if fault == "huge" else str(len(body)))
            self.end_headers()
            self.wfile.write(body[:1000] if fault == "cut" else body[:-1] + b"x" if fault == "wrong" else body)

        def log_message(self, *args):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.requests, served.faults = [], []
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setattr(dia_data, "MEDMNIST_URL", f"http://127.0.0.1:{served.server_port}/{{}}.npz?download=1")
    monkeypatch.setitem(dia_data.CHECKSUMS, "breastmnist", hashlib.md5(body).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield served
    served.shutdown()


def left(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache/dia").iterdir() if "npz" in p.name)


def test_a_set_is_downloaded_once_checked_and_trained_on(server, tmp_path):
    out = tmp_path / "run"
    server.faults = ["cut", ""]                                     # the first connection breaks: it is tried again
    assert call(train_diffusion, "--data", "breastmnist", "--out", out, *STAGE1, "--normal-class", 0) is None
    assert server.requests == ["/breastmnist.npz?download=1"] * 2 and left(tmp_path) == ["breastmnist.npz"]
    assert load_data("breastmnist", normal_class=0).train.shape[1:] == (1, 28, 28) and len(server.requests) == 2
    (tmp_path / "cache/dia/breastmnist.npz").write_bytes(b"damaged")
    load_data("breastmnist", normal_class=0)
    assert len(server.requests) == 3
    own = tmp_path / "home/.medmnist"                               # where MedMNIST's own package puts it
    own.mkdir(parents=True)
    (tmp_path / "cache/dia/breastmnist.npz").rename(own / "breastmnist.npz")
    load_data("breastmnist", normal_class=0)
    assert len(server.requests) == 3 and left(tmp_path) == []


@pytest.mark.parametrize("faults, sentence, requests", [
    (["cut"] * 3, "the connection was cut after 1000 of", 3), (["wrong"], "another checksum", 1), (["404"], "answers 404", 1),
    (["huge"], "larger than 16 GB", 1), (["elsewhere"], "http://example.invalid/file.npz is not https", 1)])
def test_a_failed_download_says_so_and_leaves_nothing(faults, sentence, requests, server, tmp_path):
    server.faults = list(faults)
    assert sentence in call(train_diffusion, "--data", "breastmnist", "--out", tmp_path / "run", *STAGE1)
    assert len(server.requests) == requests and left(tmp_path) == []


def test_a_server_that_is_not_there_and_plain_http(server, tmp_path, monkeypatch):
    server.server_close()
    server.shutdown()
    assert "3 times" in call(train_diffusion, "--data", "breastmnist", "--out", tmp_path / "run", *STAGE1)
    monkeypatch.setattr(dia_data, "MEDMNIST_URL", "http://example.invalid/{}.npz")
    assert "is not https" in call(train_diffusion, "--data", "breastmnist", "--out", tmp_path / "run", *STAGE1)
    assert dia_data.CHECKSUMS["organsmnist_224"] == "b354719e553fbbb2513d5533f52a4cb1" and len(dia_data.CHECKSUMS) == 44


def make(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(texture(np.random.default_rng(i), 24)).save(root / name)


@pytest.fixture
def by_hand(tmp_path, monkeypatch):
    """Each of the four sets as its download unzips, a few images of each folder."""
    root = tmp_path / "sets"
    monkeypatch.setenv("DIA_DATA", str(root))
    make(root / "sarscov2", *(f"{folder}/{name} ({i}).png" for folder, name in (("COVID", "Covid"), ("non-COVID", "Non-Covid"))
                              for i in range(8)))
    classes = ("dyed-lifted-polyps", "dyed-resection-margins", "esophagitis", "normal-cecum", "normal-pylorus", "normal-z-line",
               "polyps", "ulcerative-colitis")
    make(root / "kvasir/kvasir-dataset-v2", *(f"{c}/{c}-{i}.jpg" for c in classes for i in range(4)))
    make(root / "oct2017/OCT2017 ", *(f"{split}/{c}/{c}-{split}-{i}.jpeg" for split, n in (("train", 6), ("test", 3), ("val", 2))
                                      for c in ("CNV", "DME", "DRUSEN", "NORMAL") for i in range(n)))
    (root / "oct2017/__MACOSX").mkdir()
    grades = {f"{i:012x}": i % 5 for i in range(20)}
    make(root / "aptos2019", *(f"train_images/{code}.png" for code in grades), "test_images/fff.png")
    (root / "aptos2019/train.csv").write_text("id_code,diagnosis\n" + "".join(f"{c},{g}\n" for c, g in grades.items()))
    (root / "aptos2019/test.csv").write_text("id_code\nfff\n")
    return root


@pytest.mark.parametrize("name, train, normals, anomalies, groups", [
    ("sarscov2", 6, 2, 8, {"COVID", "non-COVID"}),
    ("kvasir", 9, 3, 4, {"normal-cecum", "normal-pylorus", "normal-z-line", "polyps"}),
    ("oct2017", 6, 3, 9, {"CNV", "DME", "DRUSEN", "NORMAL"}),
    ("aptos2019", 3, 1, 16, {"grade 0", "grade 1", "grade 2", "grade 3", "grade 4"})])
def test_sets_fetched_by_hand_are_read_untouched(name, train, normals, anomalies, groups, by_hand):
    data = load_data(name, 24, holdout=0)
    assert (len(data.train), int((data.labels == 0).sum()), int(data.labels.sum())) == (train, normals, anomalies)
    assert set(data.groups) <= groups and {g for g, y in zip(data.groups, data.labels, strict=True) if y} < groups
    assert data.defaults["shift"] == ("perm" if name == "kvasir" else "rotate") and data.name == name
    again = load_data(name, 24, holdout=0)
    assert again.paths == data.paths and again.fingerprint == data.fingerprint
    train_only = load_data(name, 24, ("train",), holdout=0)
    assert train_only.fingerprint == data.fingerprint and len(train_only.test) == 0


def test_what_is_missing_is_said(by_hand, tmp_path):
    argv = ["--out", tmp_path / "run", *STAGE1]
    (by_hand / "sarscov2/COVID").rename(by_hand / "sarscov2/covid19")
    said = call(train_diffusion, "--data", "sarscov2", *argv)
    assert "kaggle.com/datasets/plameneduardo" in said and "expected there: COVID, non-COVID; found: covid19, non-COVID" in said
    (by_hand / "kvasir").rename(by_hand / "other")
    assert "found: no such folder" in call(train_diffusion, "--data", "kvasir", *argv)
    (by_hand / "aptos2019/train_images/000000000003.png").unlink()
    assert "1 images of train.csv are missing" in call(train_diffusion, "--data", "aptos2019", *argv)
    (by_hand / "aptos2019/train.csv").write_text("id,grade\n1,2\n")
    assert "needed are columns id_code and diagnosis" in call(train_diffusion, "--data", "aptos2019", *argv)
    assert "pneumoniamnist" in call(train_diffusion, "--data", "PneumoniaMINST", *argv)
    assert "known: elpv, sarscov2" in call(train_diffusion, "--data", "zzz", *argv)
