"""The pictures of a request: data: URLs, and http(s) URLs of public hosts, within bounds of bytes, pixels and time.

A host's address is looked up once, checked, and connected to as it was checked, so that a second look-up cannot lead
elsewhere; every redirect is checked as the first address was. Proxies of the environment are not used.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from PIL import Image

from vlmamba import __version__
from vlmamba.models.images import MAX_PIXELS, read_image
from vlmamba.serving.errors import RequestError
from vlmamba.serving.protocol import PictureLink

_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
_BLOCK = 1 << 16
_CONNECT_SECONDS = 4.0  # then a host's next address is tried
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the IPv4 address is its end


@dataclass(frozen=True)
class Limits:
    """What a request may fetch.

    Attributes:
        remote: http and https are followed; otherwise only data: URLs are taken.
        max_bytes: of one encoded picture. seconds: for all pictures of a request.
        redirects: of one picture.
        allowed_hosts: names or addresses, as they stand in URLs, that may be private.
    """

    remote: bool = True
    max_bytes: int = 20 << 20
    seconds: float = 15.0
    redirects: int = 3
    allowed_hosts: frozenset[str] = frozenset()


class Fetcher:
    """Fetches encoded pictures."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        # A look-up cannot be told how long it may take, only be left behind.
        self._lookups = ThreadPoolExecutor(16, "lookup")
        self._tls = ssl.create_default_context()

    def fetch(self, links: Sequence[PictureLink]) -> list[bytes]:
        """The encoded pictures, one after another; one that is named twice is fetched once.

        Raises:
            RequestError: one cannot be had; its param says which.
        """
        deadline = time.monotonic() + self.limits.seconds
        found: dict[str, bytes] = {}
        for link in links:
            if link.url not in found:
                try:
                    found[link.url] = self._read(link.url, deadline)
                except ValueError as error:
                    raise RequestError(f"{link.place}: {error}", link.place, "invalid_image_url") from error
        return [found[link.url] for link in links]

    def _read(self, url: str, deadline: float) -> bytes:
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return _decode(url, self.limits.max_bytes)
        if scheme not in _PORTS:
            raise ValueError(f"{_show(url)} is not a picture's address; expected data:, https: or http:")
        if not self.limits.remote:
            raise ValueError(f"{_show(url)} is elsewhere, and this server fetches nothing; send a data: URL")
        try:
            for _ in range(self.limits.redirects + 1):
                answer = self._get(url, deadline)
                if isinstance(answer, bytes):
                    return answer
                url = answer
        except TimeoutError as error:
            raise ValueError(
                f"{_show(url)} takes too long; a request has {self.limits.seconds:g} s for its pictures"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"{_show(url)} cannot be fetched ({type(error).__name__})") from error
        raise ValueError(f"{_show(url)} is reached by more than {self.limits.redirects} redirects")

    def _get(self, url: str, deadline: float) -> bytes | str:
        """What is there, or where the server says that it is."""
        parts = _split(url)
        with self._connect(parts, deadline) as connection:
            connection.ask(parts)
            response = http.client.HTTPResponse(connection, method="GET")  # type: ignore[arg-type]
            with response:
                response.begin()
                if response.status in _REDIRECTS and response.headers["Location"]:
                    return urljoin(url, response.headers["Location"])
                if response.status != 200:
                    raise ValueError(f"{_show(url)} cannot be fetched: its server says {response.status}")
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise ValueError(f"{_show(url)} comes compressed, which was not asked for")
                return self._body(response, url)

    def _body(self, response: http.client.HTTPResponse, url: str) -> bytes:
        most = self.limits.max_bytes
        body = bytearray()
        while len(body) <= most and (response.length or 0) <= most:
            block = response.read(_BLOCK)
            if not block:
                return bytes(body)
            body += block
        raise ValueError(f"{_show(url)} has more than {most} bytes; send a smaller picture")

    def _connect(self, parts: SplitResult, deadline: float) -> _Connection:
        host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        lookup = self._lookups.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            found = lookup.result(_left(deadline))
        except UnicodeError as error:
            raise ValueError(f"{_show(host)} is not a host's name") from error
        finally:
            lookup.cancel()  # if its turn has not come yet
        addresses = [str(entry[4][0]) for entry in found]
        if host not in self.limits.allowed_hosts:
            addresses = [address for address in addresses if is_public(address)]
            if not addresses:
                raise ValueError(f"{_show(host)} is not a public host; pictures are fetched from public hosts only")
        failure: OSError = ConnectionError("no address")
        for address in addresses:
            try:
                plain = socket.create_connection((address, port), timeout=min(_left(deadline), _CONNECT_SECONDS))
            except OSError as error:
                failure = error
                continue
            if parts.scheme == "http":
                return _Connection(plain, deadline)
            with plain:  # detached from by a handshake that succeeds
                plain.settimeout(_left(deadline))
                return _Connection(self._tls.wrap_socket(plain, server_hostname=host), deadline)
        raise failure


class _Connection(io.RawIOBase):
    """A socket that gives up at a point in time, however slowly its bytes come; in http.client's eyes, a socket."""

    def __init__(self, plain: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = plain, deadline

    def ask(self, parts: SplitResult) -> None:
        """Sends the request."""
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
        query = "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?[]|") if parts.query else ""
        host = parts.hostname or ""
        host = f"[{host}]" if ":" in host else host.encode("idna").decode()
        lines = [
            f"GET {target}{query} HTTP/1.1",
            f"Host: {host}" + (f":{parts.port}" if parts.port else ""),
            f"User-Agent: vlmamba/{__version__}",
            "Accept: image/*",
            "Accept-Encoding: identity",
            "Connection: close",
        ]
        self._socket.settimeout(_left(self._deadline))
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(_left(self._deadline))
        return self._socket.recv_into(buffer)

    def close(self) -> None:
        self._socket.close()
        super().close()


def decode(links: Sequence[PictureLink], encoded: Sequence[bytes]) -> list[Image.Image]:
    """The pictures that were fetched, which have no more than MAX_PIXELS pixels together.

    Raises:
        RequestError: one is not a picture, or too large; its param says which.
    """
    pictures: dict[str, Image.Image] = {}
    pixels = 0
    for link, source in zip(links, encoded, strict=True):
        if link.url in pictures:
            continue
        try:
            pictures[link.url] = read_image(source)
        except ValueError as error:
            raise RequestError(f"{link.place}: {error}", link.place, "invalid_image") from error
        pixels += pictures[link.url].width * pictures[link.url].height
        if pixels > MAX_PIXELS:
            raise RequestError(
                f"{link.place}: up to here the pictures have {pixels} pixels; at most {MAX_PIXELS} are taken together",
                link.place,
                "invalid_image",
            )
    return [pictures[link.url] for link in links]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet; an IPv6 address that holds an IPv4 address is what that is."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(ip.packed[-4:])
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_loopback or ip.is_unspecified)


def _split(url: str) -> SplitResult:
    """The address in its parts.

    Raises:
        ValueError: it is not one of http or https, with a host and nothing secret.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in _PORTS and parts.hostname and parts.port != 0
    except ValueError as error:
        raise ValueError(f"{_show(url)} is not an address: {error}") from error
    if not usable or parts.username is not None or any(letter <= " " for letter in parts.netloc):
        raise ValueError(f"{_show(url)} is not an address that is fetched; expected http(s)://host/path")
    return parts


def _decode(url: str, most: int) -> bytes:
    """The bytes of a data: URL."""
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError(f"{_show(head)} does not begin a data: URL in base64; expected data:image/png;base64,...")
    text = "".join(text.split())
    if len(text) // 4 * 3 > most + 2:
        raise ValueError(f"the data: URL has more than {most} bytes; send a smaller picture")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the data: URL is not base64: {error}") from error


def _show(url: str) -> str:
    return repr(url if len(url) <= 80 else url[:77] + "...")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
