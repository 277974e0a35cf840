"""From the name of a model to a directory. The hub's cache is built by hand; no network."""

import importlib
from pathlib import Path

import httpx
import pytest

from frontend import model_files
from frontend.model_files import bundled_model, check_weights, find_directory
from ipc.errors import ConfigError
from tests.frontend.make_checkpoints import write_checkpoint
from tests.frontend.make_tokenizers import TINY

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


def write_cache(cache: Path, name: str = "org/model", *, weights: str | None = None) -> Path:
    """A hub cache with one model in two revisions; the revision is written into a file."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    for ref, commit in COMMITS.items():
        (root / "refs" / ref).write_text(commit)
        write_checkpoint(root / "snapshots" / commit, weights=weights, ref=ref)
    return root


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub as HF_HUB_OFFLINE=1 makes it."""
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_directory(str(TINY)) == TINY
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_directory("here", revision="ignored") == tmp_path / "here"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_directory("~/here") == tmp_path / "here"


def test_our_own_commands_have_a_model() -> None:
    assert bundled_model() == TINY


def test_an_installation_without_the_bundled_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files, "__file__", str(tmp_path / "frontend" / "model_files.py"))
    with pytest.raises(ConfigError, match="comes with the repository"):
        bundled_model()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "must name a directory"),
        ("a\0b", "must name a directory"),
        ("/nowhere/at/all", "no such directory"),
        ("./nowhere", "no such directory"),
        ("a/b/c", "no such directory"),
        (__file__, "not a file"),
    ],
)
def test_paths_that_lead_nowhere_are_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"--tokenizer.*{words}"):
        find_directory(name, flag="--tokenizer")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("revision", [None, "main", "v2", "b" * 40])
def test_a_name_is_found_in_the_cache_at_its_revision(tmp_path: Path, revision: str | None) -> None:
    write_cache(tmp_path)
    found = find_directory("org/model", revision=revision, download_dir=str(tmp_path))
    expected = COMMITS.get(revision or "main", revision)
    assert found.name == expected


@pytest.mark.usefixtures("offline")
def test_the_cache_is_searched_only_where_the_flag_says(tmp_path: Path) -> None:
    write_cache(tmp_path / "one")
    with pytest.raises(ConfigError) as error:
        find_directory("org/model", download_dir=str(tmp_path / "two"))
    for word in ("--model org/model", str(tmp_path / "two"), "HF_HUB_OFFLINE"):
        assert word in str(error.value)


@pytest.mark.usefixtures("offline")
def test_a_revision_that_is_not_cached_is_named(tmp_path: Path) -> None:
    write_cache(tmp_path)
    with pytest.raises(ConfigError, match="at revision v9"):
        find_directory("org/model", revision="v9", download_dir=str(tmp_path))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["org/model/", "-x", "a b", "x" * 300, "ünï"])
def test_names_that_no_hub_has_are_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--model"):
        find_directory(name, download_dir=str(tmp_path))


class FakeHub:
    """Records what is fetched; the weights it has are ``suffix``."""

    HF_HUB_OFFLINE = False

    def __init__(self, directory: Path, suffix: str) -> None:
        self.directory, self.suffix = directory, suffix
        self.fetched: list[list[str]] = []

    def snapshot_download(self, name: str, **options: object) -> str:
        patterns = options["allow_patterns"]
        assert isinstance(patterns, list)
        self.fetched.append([each for each in patterns if self.suffix in each])
        if self.fetched[-1]:
            (self.directory / f"weights{self.suffix}").touch()
        return str(self.directory)


@pytest.mark.parametrize(
    ("load_format", "suffix", "fetched"),
    [
        ("auto", ".safetensors", [["*.safetensors"]]),
        ("auto", ".bin", [[], ["*.bin"]]),
        ("pt", ".bin", [["*.bin"]]),
        ("dummy", ".safetensors", [[]]),
        (None, ".safetensors", [[]]),
    ],
)
def test_one_form_of_the_weights_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    load_format: str | None,
    suffix: str,
    fetched: list[list[str]],
) -> None:
    hub = FakeHub(tmp_path, suffix)
    monkeypatch.setattr(model_files.importlib, "import_module", lambda name: hub)
    assert find_directory("org/model", load_format=load_format) == tmp_path
    assert hub.fetched == fetched


class UnreachableHub(FakeHub):
    """Has what was cached, and no network."""

    def __init__(self, directory: Path, error: Exception) -> None:
        super().__init__(directory, ".safetensors")
        self.error = error

    def snapshot_download(self, name: str, **options: object) -> str:
        if not options["local_files_only"]:
            raise self.error
        return super().snapshot_download(name, **options)


@pytest.mark.parametrize("error", [ConnectionError("refused"), httpx.ConnectError("no address")])
def test_a_hub_that_cannot_be_reached_leaves_the_cache(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    hub = UnreachableHub(tmp_path, error)
    monkeypatch.setattr(model_files.importlib, "import_module", lambda name: hub)
    assert find_directory("org/model", revision="b" * 40, load_format="auto") == tmp_path
    assert f"the hub cannot be reached ({error})" in caplog.text


def test_without_the_hubs_library_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(model_files.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"huggingface_hub.* is not installed"):
        find_directory("org/model")


@pytest.mark.parametrize(
    ("load_format", "weights", "is_there"),
    [
        ("auto", "model.safetensors", True),
        ("auto", "pytorch_model.bin", True),
        ("auto", None, False),
        ("safetensors", "pytorch_model.bin", False),
        ("pt", "pytorch_model.bin", True),
        ("pt", "model.safetensors", False),
        ("npcache", "pytorch_model.bin", True),
        ("dummy", None, True),
    ],
)
def test_a_forced_form_of_weights_must_be_there(
    tmp_path: Path, load_format: str, weights: str | None, is_there: bool
) -> None:
    directory = write_checkpoint(tmp_path, weights=weights)
    if is_there:
        check_weights(directory, load_format)
        return
    with pytest.raises(ConfigError, match=f"--load-format {load_format}.*--load-format dummy"):
        check_weights(directory, load_format)
