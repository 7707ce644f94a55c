"""MedMNIST's sets by name: downloads from a server on 127.0.0.1 that misbehaves."""

import hashlib
import http.server
import threading

import pytest
from conftest import STAGE1, call
from test_data import medmnist

import dia_lib
import train_diffusion
from dia_lib import load_data


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
            if fault == "hung up":
                return None
            if fault == "not http":
                return self.wfile.write(b"220 ready\r\nfor mail\r\n")
            self.send_response(200)
            if fault == "no end":                           # broken chunks: IncompleteRead, no OSError
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                return self.wfile.write(b"400\r\n" + body[:512])
            self.send_header("Content-Length", "many" if fault == "length" else str(len(body)))
            self.end_headers()
            self.wfile.write({"cut": body[:1000], "empty": b"", "wrong": body[:-1] + b"x"}.get(fault, body))

        def log_message(self, *args):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.requests, served.faults = [], []
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setattr(dia_lib, "MEDMNIST_URL", f"http://127.0.0.1:{served.server_port}/{{}}.npz?download=1")
    monkeypatch.setitem(dia_lib.MEDMNIST_MD5, "breastmnist", hashlib.md5(body).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield served
    served.shutdown()
    served.server_close()


def left(tmp_path):
    """Every file in the cache, torch's own half-written ones among them."""
    cache = tmp_path / "cache"
    return sorted(p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file())


def test_a_set_is_downloaded_once_checked_and_trained_on(server, tmp_path):
    """A file in the cache is used unless it is damaged; before it, one that MedMNIST's package left."""
    out = tmp_path / "run"
    assert call(train_diffusion, "--data", "breastmnist", "--out", out, *STAGE1, "--normal-class", 0) is None
    assert server.requests == ["/breastmnist.npz?download=1"] and left(tmp_path) == ["dia/breastmnist.npz"]
    data = load_data("breastmnist", normal_class=0)
    assert data.train.shape[1:] == (1, 28, 28) and data.name == "breastmnist" and len(server.requests) == 1
    (tmp_path / "cache/dia/breastmnist.npz").write_bytes(b"damaged")
    load_data("breastmnist", normal_class=0)
    assert len(server.requests) == 2
    own = tmp_path / "home/.medmnist"
    own.mkdir(parents=True)
    (tmp_path / "cache/dia/breastmnist.npz").rename(own / "breastmnist.npz")
    load_data("breastmnist", normal_class=0)
    assert len(server.requests) == 2 and left(tmp_path) == []
    (own / "breastmnist.npz").write_bytes(b"damaged")
    load_data("breastmnist", normal_class=0)
    assert len(server.requests) == 3 and left(tmp_path) == ["dia/breastmnist.npz"]


@pytest.mark.parametrize("fault, sentence", [
    ("cut", "cut or changed (its MD5 is wrong)"), ("empty", "cut or changed"), ("wrong", "cut or changed"),
    ("404", "HTTP Error 404: Not Found. Try later, or fetch it by hand to"),
    ("hung up", "Remote end closed connection without response"), ("not http", "220 ready"),
    ("no end", "IncompleteRead"), ("length", "many")])
def test_a_failed_download_is_one_sentence_and_leaves_nothing(fault, sentence, server, tmp_path):
    """Nothing half-written stays in the cache; the next command downloads the file."""
    server.faults = [fault]
    said = call(train_diffusion, "--data", "breastmnist", "--out", tmp_path / "run", *STAGE1)
    assert sentence in said and "\n" not in said and dia_lib.MEDMNIST_URL.format("breastmnist") in said
    assert len(server.requests) == 1 and left(tmp_path) == []
    assert len(load_data("breastmnist").train) == 10 and left(tmp_path) == ["dia/breastmnist.npz"]


def test_a_server_that_is_not_there(server, tmp_path):
    server.shutdown()
    server.server_close()
    said = call(train_diffusion, "--data", "breastmnist", "--out", tmp_path / "run", *STAGE1)
    assert "Connection refused" in said and "fetch it by hand to" in said and "\n" not in said
    assert left(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_one_sentence(server, tmp_path):
    (tmp_path / "cache").write_text("a file, no folder")
    said = call(train_diffusion, "--data", "breastmnist", "--out", tmp_path / "run", *STAGE1)
    assert str(tmp_path / "cache") in said and "\n" not in said and server.requests == []


def test_the_normal_class_is_asked_for_before_anything_is_downloaded(server, tmp_path, monkeypatch):
    monkeypatch.setitem(dia_lib.MEDMNIST_MD5, "bloodmnist", "0" * 32)
    flags = ["--out", tmp_path / "run", *STAGE1]
    assert "--normal-class 0" in call(train_diffusion, "--data", "bloodmnist", *flags)
    assert "integers" in call(train_diffusion, "--data", "breastmnist", "--normal-class", "healthy", *flags)
    assert server.requests == [] and left(tmp_path) == []


def test_the_two_sets_of_the_paper_are_known_at_each_size():
    """Names, MD5 sums and normal labels, as MedMNIST publishes them; nothing is fetched but over https."""
    assert set(dia_lib.MEDMNIST_MD5) == {f"{name}{size}" for name in ("pneumoniamnist", "breastmnist")
                                         for size in ("", "_64", "_128", "_224")}
    assert dia_lib.MEDMNIST_MD5["breastmnist_224"] == "b56378a6eefa9fed602bb16d192d4c8b"
    assert dia_lib.MEDMNIST_NORMAL["pneumoniamnist"] == 0 and dia_lib.MEDMNIST_NORMAL["breastmnist"] == 1
    assert dia_lib.MEDMNIST_URL.startswith("https://zenodo.org/")


def test_a_name_that_is_not_known_is_told_those_that_are(tmp_path):
    said = call(train_diffusion, "--data", "PneumoniaMINST", "--out", tmp_path / "run", *STAGE1)
    assert "no such folder, npz file or set" in said and "known by name: elpv, " in said
    assert "pneumoniamnist_64" in said
