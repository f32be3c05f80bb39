"""Base models from a Hugging Face hub: which commit a name means, and the files of that commit, whole or not at all.

Two requests are all it takes (docs/decisions/0008-own-downloads.md says why they are made here):

    GET {HF_ENDPOINT}/api/models/OWNER/NAME/revision/REVISION?blobs=true     the commit, its files, sizes and hashes
    GET {HF_ENDPOINT}/OWNER/NAME/resolve/COMMIT/FILE                         a file, from a byte on; may redirect

A file grows beside its place and is taken up where it was cut, also by another process; it counts when size and hash
are those that the hub has told. The folder gets its name when all files are there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from repertory.catalogue import COMMIT, MAIN, Catalogue
from repertory.errors import BaseModelUnavailable
from repertory.manifest import sync_folder
from repertory.model.addresses import is_proxied, leads_inside, was_inside
from repertory.model.lock import alone
from repertory.model.transfer import PASSING, Attempts, Patience, Progress, Refused, Stalled, Tell, append, body
from repertory.settings import Settings

CONNECT_SECONDS = 10.0
MAX_REDIRECTS = 5
MAX_DESCRIPTION_BYTES = 256 << 20  # of one file that is not weights; the largest tokenizers have some 35 MB
MAX_ANSWER_BYTES = 32 << 20  # of the hub's list of files
SPARE_BYTES = 256 << 20  # of disk, for everything else that goes on

DESCRIPTIONS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.(json|model|txt|jinja)")
NOT_WANTED = re.compile(r"adapter_config\.json|(pytorch|tf|flax)_.*|(readme|license|notice|use_policy)[^/]*", re.I)
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")

# What httpx raises for a proxy or a certificate file of the environment that it cannot use: socks5:// without socksio,
# say, or a path in SSL_CERT_FILE that is not there.
UNUSABLE_ENVIRONMENT = (ImportError, OSError, ValueError, httpx.InvalidURL)


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    name: str
    size: int  # bytes
    sha256: str | None  # of large files
    blob: str | None  # of the others: git's name of the content

    def damage(self, path: Path) -> str | None:
        """What is wrong with the downloaded file."""
        size = path.stat().st_size
        if size != self.size:
            return f"has {size} bytes, not the {self.size} that the hub has told"
        if self.sha256 is not None:
            digest, expected = hashlib.sha256(), self.sha256
        elif self.blob is not None:
            digest, expected = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), self.blob
        else:
            return None
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return None if digest.hexdigest() == expected else "does not have the hash that the hub has told"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One commit of one model on the hub."""

    name: str
    commit: str
    files: dict[str, RemoteFile]

    @property
    def descriptions(self) -> list[RemoteFile]:
        """Everything but the weights."""
        return [
            file for name, file in self.files.items() if DESCRIPTIONS.fullmatch(name) and not NOT_WANTED.fullmatch(name)
        ]

    def weights(self, folder: Path) -> list[RemoteFile]:
        """The safetensors files that transformers would load; `folder` has the descriptions."""
        if SINGLE in self.files:
            return [self.files[SINGLE]]
        shards = shards_in(folder / INDEX, self.name)
        missing = [shard for shard in shards if shard not in self.files]
        if missing:
            raise BaseModelUnavailable(
                f"{self.name} is not whole on the hub: its index names {missing[0]}, which is not there",
                cure="Choose another revision (owner/name@revision) or another base model.",
            )
        return [self.files[shard] for shard in shards]

    def check(self) -> None:
        """Refuse what could not be loaded, before it is downloaded."""
        if SINGLE not in self.files and INDEX not in self.files:
            raise without_safetensors(self.name, list(self.files))
        if "config.json" not in self.files:
            raise BaseModelUnavailable(
                f"{self.name} has no config.json: it is no model that transformers can load",
                cure="Choose the repository of the model itself, not of an adapter or of parts of it.",
            )
        for file in self.descriptions:
            if file.size > MAX_DESCRIPTION_BYTES:
                raise BaseModelUnavailable(
                    f"{file.name} of {self.name} has {file.size} bytes; {MAX_DESCRIPTION_BYTES} are the limit"
                )


class Hub:
    """The hub that HF_ENDPOINT names."""

    def __init__(self, settings: Settings, patience: Patience | None = None) -> None:
        """Without a `patience` as long as a download deserves."""
        self._endpoint = settings.hf_endpoint.rstrip("/")
        self._token = settings.huggingface_token
        self._is_offline = settings.hf_hub_offline
        self._patience = patience or Patience(timeout_seconds=settings.hf_hub_download_timeout)
        self._may_lead_inside = settings.hf_allow_private_addresses
        self._catalogue = Catalogue(settings.model_cache_dir)

    def fetch(
        self,
        name: str,
        revision: str | None,
        say: Callable[[str], None],
        tell: Tell,
        check: Callable[[Path], None],
    ) -> Path:
        """The whole snapshot, from the cache or brought there. Of several processes that call this at once one works.

        `check` may refuse the folder when everything but the weights is there. Raises BaseModelUnavailable.
        """
        with self._client(name) as client:
            snapshot = self._resolved(client, name, revision)
            whole = self._catalogue.snapshot(name, snapshot.commit)
            with alone(whole.parent / ".lock", lambda: say(f"{name} is being downloaded by another process")):
                if not whole.is_dir():
                    say(f"downloading {name}")
                    self._bring(client, snapshot, tell, check)
                    sync_folder(self._catalogue.partial(name, snapshot.commit))
                    self._catalogue.partial(name, snapshot.commit).rename(whole)
                    sync_folder(whole.parent)
                self._catalogue.remember(name, revision or MAIN, snapshot.commit)
        return whole

    def describe(self, name: str, revision: str | None) -> Path:
        """A folder with everything but the weights. It belongs to a download that has not ended."""
        with self._client(name) as client:
            snapshot = self._resolved(client, name, revision)
            folder = self._catalogue.partial(name, snapshot.commit)
            if self._catalogue.snapshot(name, snapshot.commit).is_dir():
                return self._catalogue.snapshot(name, snapshot.commit)
            if all((folder / file.name).is_file() for file in snapshot.descriptions):
                return folder  # without waiting for the weights, which another process may be downloading for hours
            with alone(folder.parent / ".lock", lambda: None):
                folder.mkdir(parents=True, exist_ok=True)
                for file in snapshot.descriptions:
                    self._file(client, snapshot, file, folder, Progress(snapshot.commit, 0))
        return folder

    def bring_config(self, name: str, revision: str | None, folder: Path) -> None:
        """config.json alone, into a folder of the caller's; nothing in the cache changes.

        Raises BaseModelUnavailable, also where the list of the model's files tells that it could not be loaded.
        """
        with self._client(name) as client:
            snapshot = self._resolved(client, name, revision)
            snapshot.check()
            self._file(client, snapshot, snapshot.files["config.json"], folder, Progress(snapshot.commit, 0))

    def _client(self, name: str) -> httpx.Client:
        self._unless_offline(name)
        seconds = self._patience.timeout_seconds
        timeout = httpx.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds))
        try:
            return httpx.Client(timeout=timeout, headers={"accept-encoding": "identity", "user-agent": "repertory"})
        except UNUSABLE_ENVIRONMENT as error:
            raise self._unreachable(name, error) from error

    def _bring(self, client: httpx.Client, snapshot: Snapshot, tell: Tell, check: Callable[[Path], None]) -> None:
        folder = self._catalogue.partial(snapshot.name, snapshot.commit)
        snapshot.check()
        folder.mkdir(parents=True, exist_ok=True)
        descriptions = snapshot.descriptions
        if SINGLE not in snapshot.files:  # only the index says which files are the weights
            self._file(client, snapshot, snapshot.files[INDEX], folder, Progress(snapshot.commit, 0))
        wanted = [*descriptions, *snapshot.weights(folder)]
        here = sum(_bytes_of(folder, file) for file in wanted)
        progress = Progress(snapshot.commit, sum(file.size for file in wanted), tell, done=here)
        _check_space(snapshot.name, folder, progress.total - here)
        progress.add(0)
        for number, file in enumerate(wanted):
            if number == len(descriptions):
                check(folder)
            self._file(client, snapshot, file, folder, progress)
        for path in folder.glob("*.part"):
            path.unlink()  # of files that another attempt wanted

    def _resolved(self, client: httpx.Client, name: str, revision: str | None) -> Snapshot:
        asked = revision or MAIN
        url = f"{self._endpoint}/api/models/{name}/revision/{quote(asked, safe='')}?blobs=true"
        answer = bytearray()
        attempts = self._attempts(name)
        while attempts.go_on():
            with attempts.tried(), self._get(client, url, name, asked) as response:
                answer.clear()
                for chunk in body(response, self._patience):
                    answer += chunk
                    if len(answer) > MAX_ANSWER_BYTES:
                        raise self._no_hub(name)
        try:
            return _snapshot(name, json.loads(answer))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise self._no_hub(name) from error

    def _file(
        self, client: httpx.Client, snapshot: Snapshot, file: RemoteFile, folder: Path, progress: Progress
    ) -> None:
        """Download what is missing of one file, however often the connection breaks."""
        path = folder / file.name
        if path.is_file():
            return
        part = folder / f"{file.name}.part"
        is_resumed = part.exists()
        self._complete(client, snapshot, file, part, progress)
        damage = file.damage(part)
        if damage is not None and is_resumed:  # what was here from before may be what is wrong, after a power cut, say
            progress.add(-part.stat().st_size)
            part.unlink()
            self._complete(client, snapshot, file, part, progress)
            damage = file.damage(part)
        if damage is not None:
            part.unlink()
            raise BaseModelUnavailable(
                f"{file.name} of {snapshot.name} {damage}; what was downloaded is thrown away",
                code="download_damaged",
                cure="Try again. If it happens again, something between here and the hub changes what is downloaded:"
                " a proxy, or the mirror that HF_ENDPOINT names.",
            )
        part.rename(path)

    def _complete(
        self, client: httpx.Client, snapshot: Snapshot, file: RemoteFile, part: Path, progress: Progress
    ) -> None:
        url = f"{self._endpoint}/{snapshot.name}/resolve/{snapshot.commit}/{quote(file.name)}"
        attempts = self._attempts(snapshot.name)
        while attempts.go_on():
            with attempts.tried():
                begun = part.stat().st_size if part.exists() else 0
                if begun > file.size:
                    progress.add(-begun)
                    part.unlink()
                    begun = 0
                if begun < file.size or file.size == 0:
                    self._append(client, url, snapshot, part, begun, file.size, progress, attempts)

    def _append(
        self,
        client: httpx.Client,
        url: str,
        snapshot: Snapshot,
        part: Path,
        begun: int,
        size: int,
        progress: Progress,
        attempts: Attempts,
    ) -> None:
        def came(count: int) -> None:
            attempts.brought(count)
            progress.add(count)

        headers = {"range": f"bytes={begun}-"} if begun else {}
        with self._get(client, url, snapshot.name, snapshot.commit, headers) as response:
            if begun and response.status_code != httpx.codes.PARTIAL_CONTENT:
                progress.add(-begun)  # a server that sends all of it once more
                begun = 0
            try:
                append(response, part, begun, size, self._patience, came)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    here = part.stat().st_size if part.exists() else 0
                    raise _no_space(snapshot.name, part.parent, size - here) from error
                raise

    def _attempts(self, name: str) -> Attempts:
        return Attempts(self._patience, lambda error: self._exhausted(name, error))

    @contextmanager
    def _get(
        self, client: httpx.Client, url: str, name: str, revision: str, headers: dict[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        """A successful answer. The token goes to the hub's own origin alone, wherever a redirect may lead, and that is
        to no private network, unless the hub is in one itself.
        """
        authorization = {"authorization": f"Bearer {self._token}"} if self._token else {}
        request = client.build_request("GET", url, headers=(headers or {}) | authorization)
        for _ in range(MAX_REDIRECTS + 1):
            response = client.send(request, stream=True)
            if self._is_outside(request.url) and was_inside(response):  # the name has changed its mind since
                response.close()
                raise self._leads_inside(name, request.url)
            following = response.next_request
            if following is None:
                break
            response.close()
            if _origin(following.url) != _origin(httpx.URL(self._endpoint)):
                following.headers.pop("authorization", None)
            if self._endpoint.startswith("https://") and following.url.scheme != "https":
                raise self._no_hub(name)  # nothing on the way may be unprotected
            if self._is_outside(following.url) and leads_inside(following.url):
                raise self._leads_inside(name, following.url)
            request = following
        else:
            raise self._no_hub(name)
        try:
            if response.status_code in PASSING:
                raise Refused(response)
            if not response.is_success:
                raise self._refusal(response, name, revision)
            yield response
        finally:
            response.close()

    def _refusal(self, response: httpx.Response, name: str, revision: str) -> BaseModelUnavailable:
        """What the hub's answer means, and what to do about it."""
        kind = response.headers.get("x-error-code", "")
        if kind == "GatedRepo":
            token = "the token in HUGGINGFACE_TOKEN has no access to it" if self._token else "no token is set"
            then = "with the account of the token, or use another token" if self._token else "and set HUGGINGFACE_TOKEN"
            return BaseModelUnavailable(
                f"{name} is gated on the hub, and {token}",
                code="base_model_gated",
                cure=f"Accept its licence on {self._endpoint}/{name} {then}; or choose an open base model.",
            )
        if kind == "RevisionNotFound":
            return BaseModelUnavailable(
                f"{name} has no revision {revision} on the hub",
                code="revision_not_found",
                cure=f"Name a branch, tag or commit that {self._endpoint}/{name}/commits lists, or leave it out.",
            )
        if response.status_code == httpx.codes.UNAUTHORIZED and self._token and kind != "RepoNotFound":
            return BaseModelUnavailable(
                f"the hub refuses the token in HUGGINGFACE_TOKEN, with which {name} was asked for",
                code="base_model_gated",
                cure="Set HUGGINGFACE_TOKEN to a valid access token that may read, or unset it for open models.",
            )
        if response.status_code in (401, 404) and kind in ("", "RepoNotFound"):
            private = "or private and not open to the token in HUGGINGFACE_TOKEN" if self._token else "or it is private"
            return BaseModelUnavailable(
                f"the hub has no model {name}, {private}",
                code="base_model_not_found",
                cure="Check the spelling; for a private model set HUGGINGFACE_TOKEN to a token that may read it.",
            )
        if response.status_code == httpx.codes.FORBIDDEN:
            return BaseModelUnavailable(
                f"the hub refuses access to {name} (403)",
                code="base_model_gated",
                cure=f"Look at {self._endpoint}/{name}: accept its licence with the account of the token in"
                " HUGGINGFACE_TOKEN, and give the token the right to read gated models.",
            )
        return BaseModelUnavailable(
            f"the hub answers {response.status_code} when asked for {name}", cure=self._other_ways(name)
        )

    def _exhausted(self, name: str, error: Exception) -> BaseModelUnavailable:
        """After the last attempt."""
        if isinstance(error, Refused):
            wait = f" It asks to wait {error.retry_after:g} seconds." if error.retry_after else ""
            reason = "limits how often it may be asked" if error.status == 429 else "is out of order"
            return BaseModelUnavailable(
                f"{name} could not be downloaded: the hub {reason} ({error.status}).{wait}",
                cure="Start the job again later; a token in HUGGINGFACE_TOKEN raises the limits. What has been"
                " downloaded is kept.",
            )
        if isinstance(error, httpx.ReadTimeout | Stalled):
            return BaseModelUnavailable(
                f"{name} could not be downloaded: the hub sends nothing to speak of for"
                f" {self._patience.timeout_seconds:g} seconds, {self._patience.attempts} times in a row",
                cure="Start the job again when the network is better: what has been downloaded is kept."
                f" HF_HUB_DOWNLOAD_TIMEOUT sets the seconds. {self._other_ways(name)}",
            )
        if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
            return BaseModelUnavailable(
                f"{name} could not be downloaded: the connection to the hub was cut"
                f" {self._patience.attempts} times in a row",
                cure=f"Start the job again: what has been downloaded is kept. {self._other_ways(name)}",
            )
        return self._unreachable(name, error)

    def _unreachable(self, name: str, error: Exception) -> BaseModelUnavailable:
        reason = str(error).strip() or type(error).__name__
        return BaseModelUnavailable(
            f"{name} is not on this machine, and the hub at {self._endpoint} cannot be reached: {reason}",
            cure=f"Check the network, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and HF_ENDPOINT. {self._other_ways(name)}",
        )

    def _unless_offline(self, name: str) -> None:
        if self._is_offline:
            raise BaseModelUnavailable(
                f"{name} is not on this machine, and HF_HUB_OFFLINE forbids to ask the hub",
                cure=f"Unset HF_HUB_OFFLINE. {self._other_ways(name)}",
            )

    def _is_outside(self, url: httpx.URL) -> bool:
        """Whether an address must be one of the open internet: somebody else's, which a public hub has led to."""
        hub = httpx.URL(self._endpoint)
        return not (self._may_lead_inside or url.host == hub.host or is_proxied(url) or leads_inside(hub))

    def _leads_inside(self, name: str, url: httpx.URL) -> BaseModelUnavailable:
        return BaseModelUnavailable(
            f"{name} could not be downloaded: {self._endpoint} leads to {url.host}, which is in a private network",
            code="private_address",
            cure="If that is where a mirror of yours keeps its files, set HF_ALLOW_PRIVATE_ADDRESSES=true."
            f" {self._other_ways(name)}",
        )

    def _no_hub(self, name: str) -> BaseModelUnavailable:
        return BaseModelUnavailable(
            f"{name} could not be downloaded: what {self._endpoint} answers is no hub's answer",
            cure=f"Check HF_ENDPOINT, and the proxy if there is one. {self._other_ways(name)}",
        )

    def _other_ways(self, name: str) -> str:
        return (
            f"Without a network: copy the model's folder to MODEL_CACHE_DIR/{name}, or name one you have with"
            " `repertory models register NAME PATH`; gated models also need HUGGINGFACE_TOKEN. Or leave base_model out"
            " to use the default."
        )


def shards_in(index: Path, name: str) -> list[str]:
    """The files that an index of shards names: plain names of safetensors files. Raises BaseModelUnavailable."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted({str(shard) for shard in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BaseModelUnavailable(
            f"{index.name} of {name} is damaged", cure="Download it again, or choose another base model."
        ) from error
    strange = [shard for shard in shards if not SHARD.fullmatch(shard)]
    if strange or not shards:
        named = f"names {strange[0][:80]!r}, which is no file beside it" if strange else "names no file"
        raise BaseModelUnavailable(
            f"{index.name} of {name} {named}",
            code="unsafe_weights",
            cure="Do not use this model: it is damaged or hostile.",
        )
    return shards


def without_safetensors(name: str, files: list[str]) -> BaseModelUnavailable:
    """Why its weights are not loaded, by what there is instead."""
    if any(file.endswith(".gguf") for file in files):
        return BaseModelUnavailable(
            f"{name} has no .safetensors weights, but GGUF files",
            code="unsafe_weights",
            cure="Download one of them and register it: repertory models register NAME FILE.gguf.",
        )
    return BaseModelUnavailable(
        f"the base model {name} has no .safetensors weights; other formats can run code and are not loaded",
        code="unsafe_weights",
        cure="Choose a model (or a revision of it) that is published in safetensors, or convert it once with"
        " transformers.",
    )


def _snapshot(name: str, answer: dict[str, Any]) -> Snapshot:
    commit = str(answer["sha"])
    if not COMMIT.fullmatch(commit):
        raise ValueError("no commit")
    files = {}
    for sibling in answer["siblings"]:
        lfs = sibling.get("lfs") or {}
        path = str(sibling["rfilename"])
        if "/" in path:
            continue  # what lies in folders is not the model itself
        size = int(lfs.get("size", sibling.get("size")))
        if size < 0:
            raise ValueError("a file of less than nothing")
        files[path] = RemoteFile(
            name=path,
            size=size,
            sha256=lfs.get("sha256"),
            blob=None if lfs else sibling.get("blobId"),
        )
    return Snapshot(name=name, commit=commit, files=files)


def _bytes_of(folder: Path, file: RemoteFile) -> int:
    """That are already here."""
    for path in (folder / file.name, folder / f"{file.name}.part"):
        if path.exists():
            return path.stat().st_size
    return 0


def _check_space(name: str, folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed + SPARE_BYTES:
        raise _no_space(name, folder, needed)


def _no_space(name: str, folder: Path, needed: int) -> BaseModelUnavailable:
    free = shutil.disk_usage(folder).free
    return BaseModelUnavailable(
        f"the disk of MODEL_CACHE_DIR has {free / 1e9:.1f} GB free; the download of {name} still needs"
        f" {needed / 1e9:.1f} GB, and {SPARE_BYTES / 1e9:.1f} GB are left to the rest",
        code="storage_full",
        cure="Free space (repertory models list shows what base models take, repertory models remove NAME removes one)"
        " or set MODEL_CACHE_DIR to a larger disk. What has been downloaded is kept.",
    )


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    port = url.port or {"https": 443, "http": 80}.get(url.scheme)
    return url.scheme, url.host, port
