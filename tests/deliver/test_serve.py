"""The served report answers this machine's own browser at its own address, and nobody else."""

import http.client
import json
import threading

import numpy as np
import pytest

from fewscan.deliver import serve
from fewscan.deliver.scenes import Content, Layer, Scene
from fewscan.errors import ConfigError, DataError
from fewscan.space.geometry import Geometry

TOKEN = "t" * 43
GRID = Geometry((6, 5, 4), np.eye(4))


def load():
    mask = Layer(name="prediction", kind="labels", data=np.ones(GRID.shape, np.uint16))
    return Content(geometry=GRID, layers=[mask], names={1: "a"}, remarks=["r"])


def broken():
    raise DataError("/home/ann/x.nii.gz: truncated; copy it again")


@pytest.fixture(scope="module")
def port():
    listed = [Scene(title="one", load=load), Scene(title="two", load=broken)]
    with serve.server(serve.Pages("<p>page</p>", listed), token=TOKEN) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield found.server_address[1]
        found.shutdown()
        thread.join()


def ask(port, path, *, method="GET", host=None):
    connection = http.client.HTTPConnection(serve.HOST, port, timeout=10)
    connection.request(method, path, headers={"Host": host or f"{serve.HOST}:{port}"})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), content


def test_the_page_its_scenes_and_their_layers_are_answered(port):
    status, headers, content = ask(port, f"/{TOKEN}/")
    assert (status, content) == (200, b"<p>page</p>")
    assert headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    scene = json.loads(ask(port, f"/{TOKEN}/scene/0", host=f"localhost:{port}")[2])
    assert (scene["title"], scene["remarks"]) == ("one", ["r"])
    status, _, content = ask(port, f"/{TOKEN}/{scene['layers'][0]['at']}")
    assert (status, content[:2]) == (200, b"\x1f\x8b")


def test_a_scene_that_cannot_be_read_says_so_without_folders(port):
    scene = json.loads(ask(port, f"/{TOKEN}/scene/1")[2])
    assert scene["layers"] == []
    assert scene["remarks"] == ["x.nii.gz: truncated; copy it again"]


@pytest.mark.parametrize(
    "path",
    [
        "/", "/favicon.ico", f"/{'u' * 43}/", f"/{TOKEN[:-1]}/", f"/{TOKEN}/../../etc/passwd", "/../etc/passwd",
        f"/{TOKEN}/%2e%2e/%2e%2e/etc/passwd", f"/{TOKEN}/scene/9", f"/{TOKEN}/scene/-1", f"/{TOKEN}/layer/0/7",
        f"/{TOKEN}/layer/0/0/../0", f"/{TOKEN}/report.html", "//etc/passwd", f"/{TOKEN}%c3%a9/",
    ],
)  # fmt: skip
def test_everything_else_is_refused(port, path):
    status, _, content = ask(port, path)
    assert (status, content) == (403, b"403\n")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1:1", "0.0.0.0"])
def test_a_rebound_name_is_refused(port, host):
    assert ask(port, f"/{TOKEN}/", host=host)[0] == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "NONSENSE"])
def test_only_reading_is_allowed(port, method):
    assert ask(port, f"/{TOKEN}/", method=method)[0] == 403


def test_only_this_machine_is_listened_to_and_a_taken_port_is_refused(port):
    with pytest.raises(ConfigError, match=f"port {port} cannot be used"):
        serve.server(serve.Pages("", []), port=port, token=TOKEN)
    with serve.server(serve.Pages("", []), token=TOKEN) as other:
        assert other.server_address[0] == "127.0.0.1"
        assert serve.address(other, TOKEN).startswith("http://127.0.0.1:")


def test_nothing_to_show_is_refused(tmp_path):
    (tmp_path / "check.json").write_text("{}")
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(DataError, match="no scan, mask or mesh"):
        serve.view(tmp_path)
