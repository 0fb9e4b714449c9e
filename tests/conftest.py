"""Fixtures for every test: an isolated environment, and tiny real checkpoints written by transformers.

Nothing here imports torch before the environment is set, and collecting tests imports no torch at all.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from hypothesis import HealthCheck, settings

from mixmerge.checkpoint.header import DTYPE_BYTES
from mixmerge.machine import cache_root, cores

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from mixmerge.zoo import Spec, Zoo


def _kept() -> str:
    """The user's own cache, empty if there is none: a whole zoo takes minutes, and equal keys are equal bytes."""
    try:
        (cache_root() / "zoo").mkdir(parents=True, exist_ok=True)
        return str(cache_root().resolve()) if os.access(cache_root() / "zoo", os.W_OK) else ""
    except (OSError, RuntimeError):
        return ""


def _new_cache() -> Path:
    """A folder for all that this run makes once. It goes when the run ends."""
    cache = Path(tempfile.mkdtemp(prefix="mixmerge-tests-"))
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    # Compiled loops are kept by the hash of their source, and take a minute to make: the user's are as good, if
    # there is a place for them.
    (cache / "mixmerge").mkdir()
    with contextlib.suppress(OSError, RuntimeError):
        kernels = cache_root() / "kernels"
        kernels.mkdir(parents=True, exist_ok=True)
        (cache / "mixmerge" / "kernels").symlink_to(kernels.resolve())
    return cache


# The workers of pytest-xdist are children of the process that set the variable, and share its folder.
_SHARED, _OF_USER = "MIXMERGE_TESTS_CACHE", "MIXMERGE_TESTS_KEPT"
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ[_OF_USER] = _kept()
    os.environ[_SHARED] = str(_new_cache())
_CACHE = Path(os.environ[_SHARED])
os.environ.update(
    GOMP_SPINCOUNT="0",  # two OpenMP threads that spin on shared cores are 5 to 10 times slower
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_HOME=str(_CACHE / "huggingface"),
    MIXMERGE_CACHE=str(_CACHE / "mixmerge"),
    MPLBACKEND="Agg",
    MPLCONFIGDIR=str(_CACHE / "matplotlib"),
    TRANSFORMERS_VERBOSITY="error",
    NO_COLOR="1",
    COLUMNS="120",  # rich and typer wrap to the terminal otherwise
)
for _variable in ("HF_HUB_CACHE", "HF_TOKEN", "TRANSFORMERS_CACHE", "FORCE_COLOR", "XDG_CACHE_HOME"):
    os.environ.pop(_variable, None)  # each would undo a line above

# No verdict may depend on how busy the machine is; CI draws the same examples every time.
settings.register_profile(
    "mixmerge", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("mixmerge")

Dtype = Literal["bfloat16", "float16", "float32"]

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
VOCABULARY = 280  # 256 bytes, the special tokens and a few merges
_BLOCKS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GROUPED = {**_BLOCKS, "num_key_value_heads": 2, "head_dim": 8}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}

# name -> (config class, model class, configuration); each tensor shape differs from the next where it can
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "llama_tied": ("LlamaConfig", "LlamaForCausalLM", {**_GROUPED, "tie_word_embeddings": True}),
    "llama_bias": ("LlamaConfig", "LlamaForCausalLM", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GROUPED),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _GROUPED),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _BLOCKS),
    "bert": ("BertConfig", "BertModel", _BLOCKS),
    "bert_mlm": ("BertConfig", "BertForMaskedLM", _BLOCKS),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
}
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")


@dataclass(frozen=True)
class Family:
    """A base and its experts on disk, shared by all tests of a run: to change one, ``clone`` it."""

    name: str
    base: Path
    experts: list[Path]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """``-n auto``: a worker for each core; each holds torch and what it has loaded, so no more than eight."""
    return min(cores(), 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first: a run by several workers must not end with one of them at work alone."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Of all workers of a run, one at a time is in the block of this name."""
    with (_CACHE / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``family_name`` runs once for each architecture."""
    if "family_name" in metafunc.fixturenames:
        metafunc.parametrize("family_name", list(FAMILIES))


# What of an environment such libraries read as they are loaded: a program that wants another value loads them itself.
_READ_BY_LIBRARIES = (
    *("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONHASHSEED"),
    *("TRANSFORMERS_VERBOSITY",),
)
_LIBRARIES = (
    "numpy",
    "pyarrow.parquet",
    "sklearn.linear_model",
    "sklearn.neighbors",
    "torch",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "transformers.models.llama.modeling_llama",
    "peft",
)


@dataclass(frozen=True)
class Programs:
    """Python programs that start at once: see ``programs.py``.

    Args:
        folder: with a ``python`` and a ``mixmerge``, for a PATH.
    """

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "python")

    def __call__(
        self, *arguments: str | Path, folder: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """``python ARGUMENTS`` there, to its end; its input is empty, its output is caught.

        Args:
            environment: what differs from this process's.
        """
        return subprocess.run(
            [self.python, *map(str, arguments)],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="session")
def programs() -> Iterator[Programs]:
    """Starts Python programs without the seconds in which they load torch and transformers."""
    here = Path(__file__).with_name("programs.py")
    asker = runpy.run_path(str(here))["ASKER"]
    folder = Path(tempfile.mkdtemp(prefix="p", dir=_CACHE))  # short: a socket's path may have 100 letters
    server = folder / "s"
    inherited = {name: os.environ.get(name) for name in _READ_BY_LIBRARIES}
    for name, before in (("python", []), ("mixmerge", ["-P", "-m", "mixmerge"])):
        text = asker.format(
            python=sys.executable, before=before, inherited=json.dumps(inherited), socket=str(server)
        )
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    command = [sys.executable, "-P", str(here), str(server), ",".join(_LIBRARIES)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Programs(folder)
        process.communicate()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of 280 entries: any text survives encode and decode."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog, 1 + 2 = 3"] * 4, trainer)
    pad, bos, eos, unk, mask = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        mask_token=mask,
        model_max_length=64,
    )


@pytest.fixture(scope="session")
def bert(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Path]:
    """``bert(folder, "BertForMaskedLM", seed=1, **config)``: a tiny model of that class, with the tokenizer."""
    import torch
    import transformers

    def make(folder: Path, model_class: str, *, seed: int, **config: Any) -> Path:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        given = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **sizes, **config}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(transformers, model_class)(transformers.BertConfig(**given))
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def _build(name: str, seed: int) -> Any:
    """A tiny model with no parameter left at a constant, so that a lost bias or norm shows."""
    import torch
    import transformers

    config_class, model_class, settings = FAMILIES[name]
    config = getattr(transformers, config_class)(
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=0,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config).eval()
    _perturb(model, scale=0.02, seed=seed)
    return model


def _perturb(model: Any, *, scale: float, seed: int) -> None:
    """Add seeded normal noise to every parameter; a tied one gets it once."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.add_(noise.to(parameter.dtype))


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted(
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    )


def _make_family(
    root: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    experts: int,
    dtype: Dtype,
    shard_size: str | None,
    seed: int,
) -> None:
    """Write a base and its experts to ``root``, which appears when all are there."""
    import torch

    partial = Path(tempfile.mkdtemp(dir=root.parent))

    def save(model: Any, folder: Path) -> None:
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size or "5GB")
        tokenizer.save_pretrained(folder)

    for index in range(experts):
        expert = _build(name, seed)
        _perturb(expert, scale=0.01, seed=1000 * (seed + 1) + index)
        save(expert, partial / f"expert{index}")
    save(_build(name, seed), partial / "base")
    partial.rename(root)


@pytest.fixture(scope="session")
def family(tokenizer: PreTrainedTokenizerBase) -> Iterator[Callable[..., Family]]:
    """``family(name, *, experts=2, dtype="bfloat16", shard_size=None, seed=0)``: made once a run.

    Args of the callable:
        name: a key of ``FAMILIES``; other names are refused.
        experts: how many fine-tuned copies: the base plus normal noise of 0.01 on every parameter.
        dtype: of every tensor on disk.
        shard_size: ``max_shard_size`` of ``save_pretrained``: ``"20KB"`` gives several shards and an index.
        seed: another one gives another base.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    made: dict[Path, Family] = {}
    listings: dict[Path, list[tuple[str, int, int]]] = {}
    families = _CACHE / "families"
    families.mkdir(exist_ok=True)

    def make(
        name: str,
        *,
        experts: int = 2,
        dtype: Dtype = "bfloat16",
        shard_size: str | None = None,
        seed: int = 0,
    ) -> Family:
        root = families / f"{name}-{experts}-{dtype}-{shard_size}-{seed}"
        if root not in made:
            with _alone(root.name):
                if not root.exists():
                    _make_family(
                        root,
                        tokenizer,
                        name=name,
                        experts=experts,
                        dtype=dtype,
                        shard_size=shard_size,
                        seed=seed,
                    )
            listings[root] = _listing(root)
            made[root] = Family(name, root / "base", [root / f"expert{index}" for index in range(experts)])
        return made[root]

    yield make
    changed = [str(root) for root, before in listings.items() if _listing(root) != before]
    assert not changed, f"a test changed a shared checkpoint; take a clone() of it: {changed}"


@pytest.fixture(scope="session")
def built(programs: Programs) -> Callable[[Spec], Zoo]:
    """``built(spec)``: the zoo of a specification, trained once a run, whichever worker needs it first.

    One of the whole effort is a copy of the user's, who keeps it: the next run need not train it.
    """
    from mixmerge.zoo import Zoo, build, copy_to
    from mixmerge.zoo.outcomes import FILE
    from mixmerge.zoo.spec import cache_folder

    def make(spec: Spec) -> Zoo:
        target = cache_folder(spec)
        with _alone(target.name), pytest.MonkeyPatch.context() as patch:
            if spec.effort < 1:
                patch.setattr(
                    sys, "executable", programs.python
                )  # two steps are trained sooner than torch is loaded
            elif os.environ[_OF_USER]:
                if not target.exists():
                    patch.setenv("MIXMERGE_CACHE", os.environ[_OF_USER])
                    copied = copy_to(build(spec), target)
                    (copied.folder / FILE).unlink(
                        missing_ok=True
                    )  # what its experts answered is for tests to ask
                return Zoo.open(target)
            return build(spec)

    return make


@pytest.fixture(scope="session")
def zoo(built: Callable[[Spec], Zoo]) -> Path:
    """A zoo of real models that have learned next to nothing: for the mechanics, in seconds."""
    from mixmerge.zoo import Spec

    return built(Spec(effort=0.01)).folder


@pytest.fixture
def hollow(tmp_path: Path) -> Callable[..., Path]:
    """``hollow(name, tensors, *, vocabulary=None, files=1, **config)``: a model folder of that name with no data.

    Headers, sizes and config are true, the tensors are a hole in the file, so that models of any size fit.

    Args of the callable:
        tensors: name -> (safetensors dtype, shape).
        vocabulary: tokens of a ``tokenizer.json``, in the order of their ids.
        files: shards; more than one get an index.
    """

    def write(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        header, at = {}, 0
        for name, (dtype, shape) in tensors.items():
            end = at + math.prod(shape) * DTYPE_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)

    def make(
        name: str,
        tensors: dict[str, tuple[str, tuple[int, ...]]],
        *,
        vocabulary: list[str] | None = None,
        files: int = 1,
        **config: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        if vocabulary is not None:
            vocab = {token: number for number, token in enumerate(vocabulary)}
            (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
        if files == 1:
            write(folder / "model.safetensors", tensors)
            return folder
        weight_map = {}
        for number in range(files):
            shard, names = f"model-{number + 1:05d}-of-{files:05d}.safetensors", list(tensors)[number::files]
            write(folder / shard, {name: tensors[name] for name in names})
            weight_map |= dict.fromkeys(names, shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return make


@pytest.fixture
def clone(tmp_path: Path) -> Callable[[Path], Path]:
    """``clone(folder)``: a copy of it that the test may damage."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, Path(tempfile.mkdtemp(dir=tmp_path)) / folder.name))

    return copy


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    homes: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                assert name not in tensors, f"{name} is in {homes[name]} and in {path.name}"
                tensors[name], homes[name] = file.get_tensor(name), path.name
    index = folder / "model.safetensors.index.json"
    if index.exists():
        assert json.loads(index.read_text())["weight_map"] == homes, f"{index} and the shards disagree"
    else:
        assert set(homes.values()) == {"model.safetensors"}, f"{folder} has shards but no index"
    return tensors


@pytest.fixture(scope="session")
def read_tensors() -> Callable[[Path], dict[str, Tensor]]:
    """``read_tensors(folder)``: every tensor, by the safetensors library; shards and index must agree."""
    return _read_tensors


def _auto_class(config: Any, architecture: str) -> Any:
    """The Auto class that users call for this architecture."""
    import transformers

    for name in _AUTO_CLASSES:
        auto = getattr(transformers, name)
        known = auto._model_mapping
        if type(config) in known and getattr(known[type(config)], "__name__", "") == architecture:
            return auto
    raise AssertionError(f"no Auto class makes {architecture} of {type(config).__name__}")


@pytest.fixture
def assert_loads(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Any]:
    """``assert_loads(folder)``: the folder loads as users load it, whole and finite. Returns the model.

    Nothing missing, unexpected, mismatched or re-initialised; every value in memory is the one on disk (the
    model is saved again and compared, so renamed and fused weights count too); a tokenizer present loads.
    """

    def check(folder: Path) -> Any:
        import torch
        from transformers import AutoConfig, AutoTokenizer

        config = AutoConfig.from_pretrained(folder)
        auto = _auto_class(config, config.architectures[0])
        model, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
        assert not any(info.values()), f"{folder} loads with {info}"
        again = tmp_path_factory.mktemp("again")
        model.save_pretrained(again)
        on_disk, in_memory = _read_tensors(folder), _read_tensors(again)
        assert in_memory.keys() <= on_disk.keys(), f"not from disk: {in_memory.keys() - on_disk.keys()}"
        for name, tensor in in_memory.items():
            assert tensor.isfinite().all(), f"{name} is not finite"
            assert torch.equal(tensor, on_disk[name].to(tensor.dtype)), f"{name} differs from disk"
        if (folder / "tokenizer_config.json").exists():
            assert len(AutoTokenizer.from_pretrained(folder)) <= config.vocab_size
        return model.eval()

    return check


# In a process of its own, so that what earlier tests freed and the allocator keeps does not count.
_PEAK = """
import json, sys, threading, time
import torch
import transformers.models.llama.modeling_llama

torch.set_num_threads(1)
torch.ones(8, 8, requires_grad=True).sum().backward()
{setup}

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

before, peak, going = anonymous(), 0, True

def watch():
    global peak
    while going:
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
{work}
going = False
thread.join()
print(json.dumps({{"before": before, "peak": peak, **told}}))
"""


@pytest.fixture(scope="session")
def peak_of() -> Callable[..., dict[str, Any]]:
    """``peak_of(setup, work, *arguments)``: anonymous bytes before some lines of Python, and at their peak.

    ``setup`` is run before, ``work`` assigns what else is wanted to ``told``; both find the arguments in ``sys.argv``.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("RssAnon is Linux's")

    def measure(setup: str, work: str, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PEAK.format(setup=setup, work=work), *arguments],
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    return measure


@pytest.fixture(scope="session")
def on_a_terminal() -> Callable[[Path, list[str]], tuple[str, str]]:
    """``on_a_terminal(folder, command)``: its stdout, which is a pipe, and what a terminal got of its stderr."""

    def run(folder: Path, command: list[str]) -> tuple[str, str]:
        reader, end = os.openpty()
        seen = bytearray()

        def watch() -> None:
            try:
                while part := os.read(reader, 4096):
                    seen.extend(part)
            except OSError:  # how Linux says that nobody writes any more
                return

        watcher = threading.Thread(target=watch)
        watcher.start()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "150"}
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=end, check=True
        )
        os.close(end)
        watcher.join()
        os.close(reader)
        return done.stdout.decode(), seen.decode()

    return run
