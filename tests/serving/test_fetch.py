"""Pictures by URL: what is taken, and what a hostile URL, server or picture gets."""

from __future__ import annotations

import base64
import contextlib
import io
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image

from vlmamba.serving import fetch
from vlmamba.serving.errors import RequestError
from vlmamba.serving.fetch import Fetcher, Limits, decode, is_public
from vlmamba.serving.protocol import PictureLink

HERE = frozenset({"127.0.0.1"})


def png(size: tuple[int, int] = (4, 3)) -> bytes:
    stream = io.BytesIO()
    Image.new("1", size).save(stream, "PNG")
    return stream.getvalue()


def link(url: str, number: int = 0) -> PictureLink:
    return PictureLink(url, f"messages[0].content[{number}]")


def take(url: str, **limits: Any) -> bytes:
    limits = {"allowed_hosts": HERE, "seconds": 5.0} | limits
    [found] = Fetcher(Limits(**limits)).fetch([link(url)])
    return found


def refusal(url: str, **limits: Any) -> str:
    with pytest.raises(RequestError) as caught:
        take(url, **limits)
    assert (caught.value.param, caught.value.status) == ("messages[0].content[0]", 400)
    return str(caught.value)


class Gallery(ThreadingHTTPServer):
    """Shows pictures, and what is none."""

    daemon_threads = True

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str]]] = []
        super().__init__(("127.0.0.1", 0), Visit)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}/{path}"

    def handle_error(self, *args: Any) -> None:  # those who leave early
        pass


class Visit(BaseHTTPRequestHandler):
    server: Gallery

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        kind, _, rest = self.path.strip("/").partition("/")
        getattr(self, "show_" + kind)(rest)

    def show_picture(self, rest: str) -> None:
        self._begin(200, {"Content-Length": str(len(png()))})
        self.wfile.write(png())

    def show_status(self, rest: str) -> None:
        self._begin(int(rest), {})

    def show_to(self, rest: str) -> None:
        self._begin(302, {"Location": unquote(rest)})

    def show_hops(self, rest: str) -> None:
        self._begin(301, {"Location": f"/hops/{int(rest) - 1}" if int(rest) > 1 else "/picture"})

    def show_long(self, rest: str) -> None:
        self._begin(200, {"Content-Length": rest})

    def show_endless(self, rest: str) -> None:
        self._begin(200, {})
        while True:
            self.wfile.write(b"\0" * 65536)

    def show_slow(self, rest: str) -> None:
        self._begin(200, {"Content-Length": "1000"})
        self._drip()

    def show_slowhead(self, rest: str) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        self._drip()

    def show_chunked(self, rest: str) -> None:
        self.protocol_version = "HTTP/1.1"
        self._begin(200, {"Transfer-Encoding": "chunked"})
        for byte in png():
            self.wfile.write(b"1\r\n" + bytes([byte]) + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def show_zipped(self, rest: str) -> None:
        self._begin(200, {"Content-Encoding": "gzip"})

    def show_nonsense(self, rest: str) -> None:
        self.wfile.write(b"hello\r\n\r\n")

    def _drip(self) -> None:
        while True:
            self.wfile.write(b"x")
            time.sleep(0.05)

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def showing(server: Gallery) -> Iterator[Gallery]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def gallery() -> Iterator[Gallery]:
    with showing(Gallery()) as server:
        yield server


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Host names and their addresses, in place of the system's; every look-up takes the first away. Addresses are
    their own."""
    names: dict[str, list[str]] = {}

    def look_up(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        if host not in names and not host[0].isdigit():
            raise socket.gaierror(-2, "unknown")
        address = names[host].pop(0) if host in names else host
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(fetch.socket, "getaddrinfo", look_up)
    return names


# ---------------------------------------------------------------------- data: URLs


def test_data_urls() -> None:
    encoded = base64.b64encode(png()).decode()
    wrapped = "\n".join(encoded[place : place + 20] for place in range(0, len(encoded), 20))
    for url in (f"data:image/png;base64,{encoded}", f"DATA:;base64,{encoded}", f"data:image/x;a=b;base64,{wrapped}"):
        assert take(url, remote=False) == png()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png,abc", "in base64"),
        ("data:image/png;base64", "in base64"),
        ("data:image/png;base64,a*b=", "not base64"),
        ("data:image/png;base64,abcde", "not base64"),
        ("data:image/png;base64,é", "not base64"),
        ("data:image/png;base64," + "A" * 1400, "more than 1000 bytes"),
    ],
)
def test_data_urls_that_hold_nothing(url: str, words: str) -> None:
    assert words in refusal(url, max_bytes=1000)


# ---------------------------------------------------------------------- remote pictures


def test_a_remote_picture(gallery: Gallery) -> None:
    gallery.seen.clear()
    assert take(gallery.url("picture/ä b?q=1&r=ü#part")) == png()
    [(path, headers)] = gallery.seen
    assert path == "/picture/%C3%A4%20b?q=1&r=%C3%BC"
    assert headers["Host"] == f"127.0.0.1:{gallery.server_port}"
    assert headers["User-Agent"].startswith("vlmamba/")
    assert take(gallery.url("chunked")) == png()


def test_a_picture_shown_twice_is_fetched_once(gallery: Gallery) -> None:
    gallery.seen.clear()
    links = [link(gallery.url("picture/twice"), number) for number in range(3)]
    encoded = Fetcher(Limits(allowed_hosts=HERE)).fetch(links)
    assert encoded == [png()] * 3
    assert len(gallery.seen) == 1
    assert [picture.size for picture in decode(links, encoded)] == [(4, 3)] * 3


@pytest.mark.parametrize("path", ["to//picture", "to/../picture", "hops/3"])
def test_redirects(gallery: Gallery, path: str) -> None:
    assert take(gallery.url(path)) == png()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("hops/4", "more than 3 redirects"),
        ("status/404", "its server says 404"),
        ("status/302", "its server says 302"),
        ("status/204", "its server says 204"),
        ("to/file:///etc/passwd", "expected http(s)://host/path"),
        ("to/ftp://127.0.0.1/a", "expected http(s)://host/path"),
        ("to/data:;base64,AAAA", "expected http(s)://host/path"),
        ("to/http://127.0.0.2/picture", "'127.0.0.2' is not a public host"),
        ("to/http://localhost/picture", "'localhost' is not a public host"),
        ("to/http://169.254.169.254/latest/meta-data", "not a public host"),
        ("to/http://[::1]/picture", "not a public host"),
        ("long/100000000", "more than 5000 bytes"),
        ("endless", "more than 5000 bytes"),
        ("zipped", "comes compressed"),
        ("nonsense", "BadStatusLine"),
    ],
)
def test_servers_to_be_wary_of(gallery: Gallery, path: str, words: str) -> None:
    assert words in refusal(gallery.url(path), max_bytes=5000)


@pytest.mark.parametrize("path", ["slow", "slowhead"])
def test_time_runs_out_however_little_comes(gallery: Gallery, path: str) -> None:
    began = time.monotonic()
    assert "takes too long; a request has 0.3 s for its pictures" in refusal(gallery.url(path), seconds=0.3)
    assert time.monotonic() - began < 1.5


def test_all_pictures_of_a_request_share_the_time(gallery: Gallery) -> None:
    began = time.monotonic()
    links = [link(gallery.url(f"slow/{number}"), number) for number in range(3)]
    with pytest.raises(RequestError, match="too long"):
        Fetcher(Limits(allowed_hosts=HERE, seconds=0.3)).fetch(links)
    assert time.monotonic() - began < 1.5


def test_names_that_take_too_long_to_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *_, **__: time.sleep(1))
    began = time.monotonic()
    assert "too long" in refusal("http://example.org/a.png", seconds=0.2)
    assert time.monotonic() - began < 0.9


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "/etc/passwd", "docs/scene.png", "", "ftp://example.org/a", "javascript:1", "HTTP//x",
        "http:///a.png", "http://", "http://[::1", "http://host:99999/a", "http://host:0/", "http://user:pass@host/a",
        "https://user@host/", "http://a b/c", "http://" + "a" * 70 + ".example/", "http://a..b/",
    ],
)  # fmt: skip
def test_urls_that_are_none(url: str) -> None:
    assert f"0].content[0]: {url[:60]!r}"[:-1] in refusal(url) or "not a host's name" in refusal(url)


def test_nothing_is_fetched_where_that_is_switched_off(gallery: Gallery) -> None:
    gallery.seen.clear()
    assert "fetches nothing; send a data: URL" in refusal(gallery.url("picture"), remote=False)
    assert gallery.seen == []


# ---------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.9.9.9", "169.254.169.254", "172.16.0.1", "192.168.1.1",
        "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::127.0.0.1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1",
        "2001:db8::1", "2001::1", "100::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1",
        "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f.1", "0177.0.0.1", "[::ffff:127.0.0.1]", "LOCALHOST"])
def test_other_spellings_of_private_hosts(gallery: Gallery, host: str) -> None:
    gallery.seen.clear()
    refusal(gallery.url("picture", host), allowed_hosts=frozenset())
    assert gallery.seen == []


def test_a_private_host_is_named_but_not_its_address(lookups: dict[str, list[str]]) -> None:
    lookups["inside.example"] = ["10.20.30.40"]
    words = refusal("http://inside.example/a.png")
    assert "'inside.example' is not a public host" in words
    assert "10.20" not in words


def test_a_name_is_looked_up_once(
    gallery: Gallery, lookups: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is public when it is checked and private afterwards leads nowhere else than where it was checked."""
    lookups["rebinding.example"] = ["8.8.8.8", "127.0.0.1"]
    called = []

    def connect(address: tuple[str, int], **_: Any) -> socket.socket:
        called.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(fetch.socket, "create_connection", connect)
    assert "ConnectionRefusedError" in refusal(gallery.url("picture", "rebinding.example"))
    assert called == [("8.8.8.8", gallery.server_port)]
    assert lookups["rebinding.example"] == ["127.0.0.1"]
    assert "gaierror" in refusal("http://nowhere.example/")


def test_a_name_with_several_addresses(
    gallery: Gallery, lookups: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Private ones are passed over, and where one does not answer the next is tried."""
    found = [(2, 1, 6, "", (address, 1)) for address in ("10.0.0.1", "8.8.8.8", "9.9.9.9")]
    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *_, **__: found)
    called = []

    def connect_here(address: tuple[str, int], **options: Any) -> socket.socket:
        called.append(address[0])
        if address[0] == "8.8.8.8":
            raise TimeoutError
        here = socket.socket()
        here.connect(("127.0.0.1", gallery.server_port))
        return here

    monkeypatch.setattr(fetch.socket, "create_connection", connect_here)
    assert take("http://many.example/picture") == png()
    assert called == ["8.8.8.8", "9.9.9.9"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_certificates_are_checked(tmp_path: Path, lookups: dict[str, list[str]]) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-subj", "/CN=gallery.example", "-addext", "subjectAltName=DNS:gallery.example",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    server = Gallery()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    fetcher = Fetcher(Limits(allowed_hosts=frozenset({"gallery.example", "other.example"})))
    with showing(server):
        lookups["gallery.example"] = lookups["other.example"] = ["127.0.0.1"] * 3
        shown = [link(f"https://gallery.example:{server.server_port}/picture")]
        with pytest.raises(RequestError, match="SSLCertVerificationError"):  # nobody known has signed it
            fetcher.fetch(shown)
        fetcher._tls.load_verify_locations(certificate)
        assert fetcher.fetch(shown) == [png()]
        with pytest.raises(RequestError, match="SSLCertVerificationError"):  # signed, but for another host
            fetcher.fetch([link(f"https://other.example:{server.server_port}/picture")])


# ---------------------------------------------------------------------- pictures


def test_what_is_no_picture() -> None:
    stream = io.BytesIO()
    Image.linear_gradient("L").save(stream, "JPEG")
    half = stream.getvalue()[: len(stream.getvalue()) // 2]
    for source, words in ((b"hello", "not an image"), (half, "damaged"), (b"", "not an image")):
        with pytest.raises(RequestError, match=words) as caught:
            decode([link("u", 4)], [source])
        assert caught.value.param == "messages[0].content[4]"


def test_bombs() -> None:
    """A few kilobytes that would decode to hundreds of megabytes: at once, and a picture at a time."""
    with pytest.raises(RequestError, match="too large"):
        decode([link("u")], [png((20_000, 20_000))])
    three = [png((6000, 6000))] * 3
    assert len(three[0]) < 10_000
    links = [link(f"u{number}", number) for number in range(3)]
    assert len(decode(links[:2], three[:2])) == 2
    with pytest.raises(RequestError, match="108000000 pixels") as caught:
        decode(links, three)
    assert caught.value.param == "messages[0].content[2]"
