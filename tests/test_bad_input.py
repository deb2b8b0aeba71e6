"""Every bad input there is: exit code 2 or 4, one message with what is allowed, no traceback, nothing lost."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from autoprune.cli.main import main
from autoprune.config import make_config
from autoprune.naming import StudyPaths
from autoprune.study.settings import settings_text
from autoprune.study.store import StudyStore

# The contract is 2 seconds where no model must be built; a loaded test machine gets more, a hang does not.
LIMIT_S = 30.0
Prepare = Callable[[Path], None]


def nothing(folder: Path) -> None:
    """Prepare nothing."""


def text(name: str, content: str) -> Prepare:
    """Write a file."""

    def prepare(folder: Path) -> None:
        (folder / name).write_text(content, encoding="utf-8")

    return prepare


def large(folder: Path) -> None:
    """Write 50 MB of YAML, as a hole in the file."""
    with (folder / "x.yaml").open("wb") as stream:
        stream.truncate(50_000_000)


def images(*classes: str, corrupt: bool = False) -> Prepare:
    """Write an image folder."""

    def prepare(folder: Path) -> None:
        for label in classes:
            (folder / "images" / label).mkdir(parents=True)
            for index in range(30):
                path = folder / "images" / label / f"{index}.png"
                if corrupt:
                    path.write_bytes(b"\x89PNG\r\n\x1a\n not an image")
                else:
                    Image.new("RGB", (32, 32), (index, 0, 0)).save(path)
        (folder / "images").mkdir(exist_ok=True)

    return prepare


class Canary:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def malicious(folder: Path) -> None:
    """Write a pickle that runs code, under the name of weights."""
    (folder / "weights.pt").write_bytes(pickle.dumps({"state": Canary(folder / "canary")}))


def studied(pipe: str = "", **settings: object) -> Prepare:
    """Make an empty study ``s``, some of its settings other ones, and perhaps a pipe that nobody writes to."""

    def prepare(folder: Path) -> None:
        config = make_config({"model": "cifar_resnet20", "data": "digits", "study": "s"})
        store = StudyStore.create_or_resume(config, StudyPaths.of("s"))
        store.release()
        place = store.paths.settings
        changed = {**store.settings(), **settings}
        place.write_text(settings_text(changed), encoding="utf-8")
        if pipe:
            os.mkfifo(folder / pipe)

    return prepare


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        name: For people.
        words: The command; ``{tmp}`` is the test's folder.
        says: What the message must hold.
        code: Exit code.
        prepare: Writes the files that the command names.
        studies: Where studies would go; the test's own folder if empty.
    """

    name: str
    words: str | list[str]
    says: list[str] = field(default_factory=list)
    code: int = 2
    prepare: Prepare = nothing
    studies: str = ""

    def arguments(self, folder: Path) -> list[str]:
        words = self.words.split() if isinstance(self.words, str) else self.words
        return [word.replace("{tmp}", str(folder)) for word in words]


SEARCH = "search --model cifar_resnet20 --data digits --budget 5m "
FOLDER = "search --model cifar_resnet20 --budget 5m --data imagefolder:{tmp}/images"
BUDGETS = ["0", "0s", "-5m", "5 bananas", "", "nan", "1e99h", "99999d", "2.5trials", "5m5", "５m"]
STUDIES = [
    "..",
    "../x",
    "a/b",
    "/etc/x",
    "a\0b",
    "x" * 300,
    "",
    "-rf",
    "é",
    "x'; DROP TABLE trials;--",
    "<script>",
    ".x",
]

CASES = [
    Case("verb", "serch", ["search"]),
    Case("option", "search --modle resnet18", ["--model"]),
    Case("no model", "search --data digits", ["model is required"]),
    Case("model", "search --model resnet81 --data digits", ["unknown model 'resnet81'; did you mean", "'resnet18'"]),
    Case("model file", "search --model gone.py:build --data digits --trust-code", ["gone.py"]),
    Case("code without trust", "search --model {tmp}/m.py:build --data digits", ["--trust-code"], prepare=text("m.py", "1/0")),
    Case("data", "search --model cifar_resnet20 --data digit", ["unknown data 'digit'; did you mean 'digits'"]),
    Case("space", SEARCH + "--space defualt", ["unknown search space 'defualt'; did you mean 'default'?", "quick"]),
    Case("space file", SEARCH + "--space {tmp}/gone.yaml", ["gone.yaml", "no such file"]),
    Case("sampler", SEARCH + "--sampler tpo", ["sampler = 'tpo'", "'auto', 'tpe', 'nsga2', 'random' or 'grid'"]),
    Case("limit of size", SEARCH + "--max-size-mb 0", ["limits.max_size_mb = 0.0", "greater than 0"]),
    Case("limit of latency", SEARCH + "--max-latency-ms nan", ["limits.max_latency_ms = nan"]),
    Case("limit that is none", SEARCH + "limits.max_speed=3", ["limits.max_speed", "not permitted"]),
    Case("part of the search", SEARCH + "auto.lineaeg=false", ["auto.lineaeg", "not permitted"]),
    Case("switch", SEARCH + "auto.lineage=perhaps", ["auto.lineage = 'perhaps'", "boolean"]),
    Case("heat map", "profile --model cifar_resnet20 --data digits --to {tmp}/map.jpg", ["map.jpg", ".png"]),
    Case(
        "rungs without a screen",
        SEARCH + "--dry-run --space {tmp}/s.yaml",
        ["s.yaml:1: rungs", "start with 0, the screen, and rise", "[50, 200]"],
        prepare=text("s.yaml", "rungs: [{steps: 50}, {steps: 200}]"),
    ),
    Case(
        "rungs that fall",
        SEARCH + "--dry-run --space {tmp}/s.yaml",
        ["rise from rung to rung", "[0, 200, 50]"],
        prepare=text("s.yaml", "rungs: [{steps: 0}, {steps: 200}, {steps: 50}]"),
    ),
    Case(
        "examples of a training rung",
        SEARCH + "--dry-run --space {tmp}/s.yaml",
        ["examples is for the screen alone"],
        prepare=text("s.yaml", "rungs: [{steps: 0}, {steps: 50, examples: 100}]"),
    ),
    Case(
        "ratio 1 where no block is",
        SEARCH + "--dry-run --space {tmp}/s.yaml",
        ["'layer2.0.conv1' gives ratio 1.0 alone", "allowed: ratios below 1"],
        prepare=text("s.yaml", "overrides: [{groups: layer2.0.conv1, ratios: [1.0]}]"),
    ),
    Case(
        "recipe that takes out what is no block",
        "compress --model cifar_resnet20 --data digits --recipe {tmp}/r.yaml --to {tmp}/to",
        ["'layer2.0.conv1' has ratio 1", "allowed: below 1"],
        prepare=text("r.yaml", "groups: {layer2.0.conv1: {ratio: 1.0}}"),
    ),
    Case("objective", SEARCH + "--objectives accuracy,speed", ["'speed'", "'accuracy', 'latency' or 'size'"]),
    Case("objectives", SEARCH + "--objectives accuracy", ["objectives 'accuracy'", "allowed: accuracy with"]),
    Case("target", SEARCH + "--target tensorflow", ["unknown target 'tensorflow'; did you mean", "onnxruntime", "autoprune doctor"]),
    Case("target threads", SEARCH + "target.threads=0", ["target.threads = 0", "greater than or equal to 1"]),
    Case("engine", SEARCH + "--engine spark", ["unknown engine 'spark'", "local"]),
    Case("address", SEARCH + "--engine ray --address nowhere", ["address 'nowhere'", "ray://HOST:PORT"]),
    Case("address without a cluster", SEARCH + "--address auto", ["--address is for a cluster", "--engine ray"]),
    Case("parts of GPUs", SEARCH + "--engine ray --gpus-per-trial 1.5", ["gpus_per_trial 1.5", "whole ones"]),
    Case("workers", SEARCH + "--workers 0", ["workers = 0", "greater than or equal to 1"]),
    Case("artifacts", SEARCH + "--engine ray --artifacts s3://k:s@b/f", ["password or a query", "environment"]),
    Case("storage", SEARCH + "--storage mysql://u:secret@h/db", ["'mysql:…'", "allowed: sqlite", "postgresql://USER@HOST/DATABASE"]),
    Case("storage without a database", SEARCH + "--storage postgresql://u:secret@h", ["'postgresql:…' is no complete URL", "PGPASSWORD"]),
    Case("setting", SEARCH + "buget=5m", ["unknown setting 'buget'; did you mean 'budget'"]),
    Case("no setting", SEARCH + "budget", ["neither an option nor key=value"]),
    Case("setting inside a text", SEARCH + "model.name=x", ["'model' holds no settings"]),
    Case("seed", SEARCH + "seed=-1", ["seed = -1", "greater than or equal to 0"]),
    Case("criterion", "compress --model cifar_resnet20 --data digits --criterion talyor --to {tmp}/to", ["did you mean 'taylor'"]),
    Case("bits", "compress --model cifar_resnet20 --data digits --bits 7 --to {tmp}/to", ["bits 7", "8, 16, 32"]),
    Case("activation bits", "compress --model cifar_resnet20 --data digits --activation-bits 4 --to {tmp}/to", ["activation bits 4", "8, 16, 32"]),
    Case("block size", "compress --model cifar_resnet20 --data digits --block-size 48 --to {tmp}/to", ["block size 48", "16, 32, 64, 128, 256"]),
    Case("blocks in int8", "compress --model cifar_resnet20 --data digits --block-size 32 --bits 4 --to {tmp}/to", ["--block-size 32", "--activation-bits 16, 32"]),
    Case("half", "compress --model cifar_resnet20 --data digits --bits 16 --half bflot16 --to {tmp}/to", ["did you mean 'bfloat16'"]),
    Case("fp8 without a GPU", "compress --model cifar_resnet20 --data digits --bits 8 --activations fp8 --to {tmp}/to", ["runs nothing in fp8", "torch:cuda"]),
    Case("activations", "compress --model cifar_resnet20 --data digits --activations dynamc --to {tmp}/to", ["did you mean 'dynamic'"]),
    Case("dynamic elsewhere", "compress --model cifar_resnet20 --data digits --activations dynamic --target openvino --to {tmp}/to", ["'openvino'", "activations 'dynamic'", "onnxruntime"]),
    Case("equalize", "compress --model cifar_resnet20 --data digits --equalize crosslayer --to {tmp}/to", ["did you mean 'cross_layer'"]),
    Case("smooth alpha", "compress --model cifar_resnet20 --data digits --equalize smooth --smooth-alpha 1.5 --to {tmp}/to", ["--smooth-alpha 1.5", "from 0 to 1"]),
    Case("equalized training", "compress --model cifar_resnet20 --data digits --equalize smooth --aware 0.5 --to {tmp}/to", ["equalize 'smooth'", "aware 0.5", "allowed with it: aware 0"]),
    Case("integers of floats", "compress --model cifar_resnet20 --data digits --bits 32 --rounding gptq --to {tmp}/to", ["--rounding with --bits 32", "2 to 8"]),
    Case("half of nothing", "compress --model cifar_resnet20 --data digits --half bfloat16 --to {tmp}/to", ["--half bfloat16", "--bits 16"]),
    Case("smooth alpha of nothing", "compress --model cifar_resnet20 --data digits --equalize cross_layer --smooth-alpha 0.3 --to {tmp}/to", ["--smooth-alpha 0.3", "smooth or both", "cross_layer"]),
    Case("dynamic floats", "compress --model cifar_resnet20 --data digits --activations dynamic --activation-bits 32 --to {tmp}/to", ["--activations dynamic", "--activation-bits 8"]),
    Case("halves and auto", SEARCH + "--space {tmp}/s.yaml", ["auto) cannot search", "quantization holds several choices"], prepare=text("s.yaml", "bits: [16, 32]\nquantization: {half: [float16, bfloat16]}")),
    Case("blocks of a space", SEARCH + "--space {tmp}/s.yaml", ["block_size [32]", "activation_bits"], prepare=text("s.yaml", "quantization: {block_size: 32}")),
    Case("dynamic space elsewhere", SEARCH + "--target openvino --space {tmp}/s.yaml", ["'openvino'", "dynamic"], prepare=text("s.yaml", "quantization: {activations: dynamic}")),
    Case("sparsity", "compress --model cifar_resnet20 --data digits --sparsity 1 --to {tmp}/to", ["sparsity 1", "below 1"]),
    Case("sparsity of a pattern", "compress --model cifar_resnet20 --data digits --sparsity 0.8 --pattern 2:4 --to {tmp}/to", ["sparsity 0.8", "0 or 0.5"]),
    Case("pattern", "compress --model cifar_resnet20 --data digits --pattern 4:2 --to {tmp}/to", ["'4:2'", "N below M"]),
    Case("allocation", "compress --model cifar_resnet20 --data digits --sparsity 0.5 --allocation lamb --to {tmp}/to", ["did you mean 'lamp'"]),
    Case("mask criterion", "compress --model cifar_resnet20 --data digits --sparsity 0.5 --mask-criterion magnitute --to {tmp}/to", ["did you mean 'magnitude'"]),
    Case("mask of nothing", "compress --model cifar_resnet20 --data digits --allocation erk --to {tmp}/to", ["--allocation", "--sparsity S"]),
    Case("movement without steps", "compress --model cifar_resnet20 --data digits --sparsity 0.5 --mask-criterion movement --steps 0 --to {tmp}/to", ["'movement'", "at least 1"]),
    Case("masks and auto", SEARCH + "--space sparse", ["auto) cannot search", "sparsities", "--sampler tpe"]),
    Case("schedule", "compress --model cifar_resnet20 --data digits --schedule iteratve --to {tmp}/to", ["did you mean 'iterative'"]),
    Case("rounds of a schedule without", "compress --model cifar_resnet20 --data digits --rounds 3 --to {tmp}/to",
         ["--rounds 3", "'one_shot' has no rounds", "iterative and gradual"]),
    Case("one round", "compress --model cifar_resnet20 --data digits --schedule iterative --rounds 1 --to {tmp}/to",
         ["rounds = 1", "greater than or equal to 2"]),
    Case("gradual without steps", "compress --model cifar_resnet20 --data digits --schedule gradual --steps 0 --to {tmp}/to",
         ["'gradual' prunes while it trains", "at least 1 step"]),
    Case("recipe with schedule", "compress --model cifar_resnet20 --data digits --recipe r.yaml --schedule sparse --to {tmp}/to",
         ["--recipe and --schedule exclude"], prepare=text("r.yaml", "groups: {}")),
    Case("schedules of the default search", SEARCH + "--space {tmp}/s.yaml",
         ["schedules.kind = ['one_shot', 'iterative']", "--sampler tpe"],
         prepare=text("s.yaml", "schedules: {kind: [one_shot, iterative]}")),
    Case("ratio of tickets", "tickets --model cifar_resnet20 --data digits --ratio 1 --to {tmp}/to", ["ratio = 1.0", "less than 1"]),
    Case("rewind step of tickets", "tickets --model cifar_resnet20 --data digits --steps 5 --rewind-step 5 --to {tmp}/to",
         ["rewind_step 5 must be below the steps, 5"]),
    Case("weights of tickets", "tickets --model resnet18 --data digits --weights DEFAULT --to {tmp}/to",
         ["a ticket begins with random weights"]),
    Case("target folder of tickets", "tickets --model cifar_resnet20 --data digits --to {tmp}/f", ["is not an empty folder"],
         prepare=text("f", "kept")),
    Case("ratio", "compress --model cifar_resnet20 --data digits --ratio 1.5 --to {tmp}/to", ["ratio 1.5", "below 1"]),
    Case("rank ratio", "compress --model cifar_resnet20 --data digits --rank-ratio 1 --to {tmp}/to", ["rank ratio 1", "below 1"]),
    Case("weight of features", "compress --model cifar_resnet20 --data digits --feature-distill -1 --to {tmp}/to",
         ["feature_distill = -1", "greater than or equal to 0"]),
    Case("order", "compress --model cifar_resnet20 --data digits --order tune-first --to {tmp}/to",
         ["unknown order 'tune-first'", "tune-prune-quantize"]),
    Case("recipe with rank ratio", "compress --model cifar_resnet20 --data digits --recipe r.yaml --rank-ratio 0.5 --to {tmp}/to",
         ["--recipe and --rank-ratio exclude"]),
    Case(
        "ranks for the default search",
        SEARCH + "--space {tmp}/s.yaml",
        ["rank_ratios = [0.0, 0.5]; allowed: [0.0]", "--sampler tpe"],
        prepare=text("s.yaml", "rank_ratios: [0.0, 0.5]"),
    ),
    Case(
        "group of a recipe",
        "compress --model cifar_resnet20 --data digits --recipe {tmp}/r.yaml --to {tmp}/to",
        ["unknown group 'conv11'; did you mean 'conv1'"],
        prepare=text("r.yaml", "groups: {conv11: {ratio: 0.5}}"),
    ),
    Case(
        "group of a space",
        SEARCH + "--dry-run --space {tmp}/s.yaml",
        ["unknown group 'lyer1*'", "layer1.0.conv1"],
        prepare=text("s.yaml", "overrides: [{groups: 'lyer1*', bits: [8]}]"),
    ),
    Case(
        "recipe with ratio",
        "compress --model cifar_resnet20 --data digits --recipe r.yaml --ratio 0.5 --to {tmp}/to",
        ["--recipe and --ratio exclude"],
    ),
    Case("missing folder", FOLDER, ["{tmp}/images"]),
    Case("empty folder", FOLDER, ["{tmp}/images"], prepare=images()),
    Case("one class", FOLDER, ["class"], prepare=images("cat")),
    Case("corrupt images", FOLDER, ["0.png"], prepare=images("cat", "dog", corrupt=True)),
    Case("malicious weights", SEARCH + "--weights {tmp}/weights.pt", ["weights.pt", "safetensors"], prepare=malicious),
    Case("missing weights", SEARCH + "--weights {tmp}/gone.safetensors", ["gone.safetensors"]),
    Case(
        "broken weights",
        SEARCH + "--weights {tmp}/broken.safetensors",
        ["broken.safetensors"],
        prepare=text("broken.safetensors", "not tensors"),
    ),
    Case("settings file", "search -c {tmp}/gone.yaml", ["gone.yaml", "no such file"]),
    Case("settings of wrong type", "search -c {tmp}/x.yaml", ["seed = 'x'", "x.yaml"], prepare=text("x.yaml", "model: a\nseed: x")),
    Case("settings unknown", "search -c {tmp}/x.yaml", ["x.yaml:2: unknown setting 'sead'; did you mean 'seed'"],
         prepare=text("x.yaml", "model: a\nsead: 1")),
    Case("settings twice", "search -c {tmp}/x.yaml", ["x.yaml:2: the key 'model' is there twice"],
         prepare=text("x.yaml", "model: a\nmodel: b")),
    Case("settings of 50 MB", "search -c {tmp}/x.yaml", ["50,000,000 bytes", "1,000,000"], prepare=large),
    Case("settings with aliases", "search -c {tmp}/x.yaml", ["x.yaml:1: anchors"], prepare=text("x.yaml", "model: &a b\ndata: *a")),
    Case("settings in a list", "search -c {tmp}/x.yaml", ["mapping"], prepare=text("x.yaml", "- a")),
    Case("space of wrong type", SEARCH + "--space {tmp}/x.yaml", ["x.yaml:1: width = 'x'", "from 1 to 1024, or auto"], prepare=text("x.yaml", "width: x")),
    Case("space unknown", SEARCH + "--space {tmp}/x.yaml", ["x.yaml:1: unknown setting 'with'; did you mean 'width'"],
         prepare=text("x.yaml", "with: 8")),
    Case("space of 50 MB", SEARCH + "--space {tmp}/x.yaml", ["50,000,000 bytes"], prepare=large),
    Case("space with aliases", SEARCH + "--space {tmp}/x.yaml", ["x.yaml:2: aliases"], prepare=text("x.yaml", "width: 8\nbits: *a")),
    Case("ranking", "compress --model cifar_resnet20 --data digits --ranking globe --to {tmp}/to", ["did you mean 'global'"]),
    Case("auto ranking", SEARCH + "--space {tmp}/x.yaml", ["rankings = ['group', 'global']", "--sampler tpe"],
         prepare=text("x.yaml", "rankings: [group, global]")),
    Case("space criterion", SEARCH + "--space {tmp}/x.yaml", ["did you mean 'taylor'"],
         prepare=text("x.yaml", "criteria: {conv: [talyor]}")),
    Case("full without measure", "doctor --full", ["--full goes with --measure"]),
    Case("target of the doctor", "doctor --measure --target onnxruntme", ["unknown target 'onnxruntme'; did you mean 'onnxruntime'"]),
    Case("part of the doctor's target", "doctor --measure --target onnxruntime:quick", ["'quick' is not understood", "[:threads=N]"]),
    Case("threads of the doctor's target", "doctor --measure --target onnxruntime:threads=0", ["threads = 0", "greater than or equal to 1"]),
    Case("tables of nothing", "doctor --to {tmp}/to", ["nothing was measured here", "autoprune doctor --measure"]),
    Case("tables into a file", "doctor --to {tmp}/f", ["is no folder"], prepare=text("f", "kept")),
    *(Case(f"budget {text!r}", ["search", "--model", "resnet18", "--budget", text], ["budget"]) for text in BUDGETS),
    *(Case(f"study {name[:30]!r}", ["search", "--model", "resnet18", "--study", name], ["study name", "A-Z a-z 0-9"]) for name in STUDIES),
    *(Case(f"front of {name!r}", ["front", name], ["study name", "A-Z a-z 0-9"]) for name in ("..", "a/b", "a\0b")),
    Case("front of none", "front nothing", ["'nothing'"]),
    Case("report of none", "report nothing", ["'nothing'"]),
    Case("export of none", "export nothing --trial 1 --to {tmp}/to", ["'nothing'"]),
    Case("limits that exclude", "front nothing --max-drop 0.1 --min-accuracy 0.5", ["exclude each other"]),
    Case("limit below zero", ["front", "nothing", "--max-drop", "-1"], []),
    Case("artifact", "measure {tmp}/gone --data digits", ["gone", "does not exist"]),
    Case("no artifact", "measure {tmp} --data digits", ["is not an exported artifact", "lacks"]),
    Case("target folder of export", "compress --model cifar_resnet20 --data digits --to {tmp}/f", ["is not an empty folder"],
         prepare=text("f", "kept")),
    Case("copy over a file", "spaces copy default {tmp}/f", ["exists already"], prepare=text("f", "kept")),
    Case("copy to nowhere", "spaces copy default {tmp}/gone/f", ["cannot be written"], code=4),
    Case("measurements in a pipe", "front s --measurements {tmp}/pipe", ["pipe", "not a regular file"], prepare=studied("pipe")),
    Case("endless measurements", "front s --measurements /dev/zero", ["/dev/zero", "not a regular file"], prepare=studied()),
    Case("unknown objective of a study", "front s", ["settings.yaml", "objectives"], code=4, prepare=studied(objectives=["speed"])),
    Case("unknown runtime of a study", "front s", ["settings.yaml", "target"], code=4, prepare=studied(target={"runtime": "x"})),
    Case("show nothing", "spaces show defualt", ["did you mean 'default'"]),
    Case("studies below a file", SEARCH, ["f"], code=4, prepare=text("f", "kept"), studies="{tmp}/f/studies"),
    Case("studies that cannot be written", SEARCH, ["/proc"], code=4, studies="/proc/studies"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case.prepare(tmp_path)
    if case.studies:
        monkeypatch.setenv("AUTOPRUNE_STUDIES", case.studies.replace("{tmp}", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    begun = time.monotonic()

    code = main(case.arguments(tmp_path))

    shown = capsys.readouterr()
    message = shown.err[shown.err.find("autoprune: ") :]
    assert (code, shown.out) == (case.code, ""), shown.err
    assert message.startswith("autoprune: ") and message.count("autoprune: ") == 1
    assert "Traceback" not in shown.err and "bug of autoprune" not in shown.err
    for part in case.says:
        assert part.replace("{tmp}", str(tmp_path)) in message
    assert "secret" not in shown.err
    assert len(message) < 3000
    assert time.monotonic() - begun < LIMIT_S
    assert tree(tmp_path) == before


def tree(folder: Path) -> dict[str, int]:
    """Return every file and its size, without the cache, which may be filled."""
    return {
        str(path.relative_to(folder)): path.stat().st_size if path.is_file() else -1
        for path in sorted(folder.rglob("*"))
        if path.relative_to(folder).parts[0] not in ("cache", "data")
        and not path.name.endswith(("-wal", "-shm"))  # of a database, while a connection to it is open
    }


def test_a_full_disk_is_told_and_the_next_run_goes_on(program: list[str], tmp_path: Path) -> None:
    """No file may grow beyond 8 kB, which a database needs at once: as good as a full disk."""
    words = [
        *program,
        "search",
        "--model",
        "cifar_resnet20",
        "--data",
        "digits",
        "--budget",
        "1m",
        "--study",
        "full",
    ]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path)}
    result = subprocess.run(
        words, capture_output=True, text=True, timeout=120, preexec_fn=limit, env=environment, check=False
    )
    assert result.returncode == 4, result.stderr
    assert "Traceback" not in result.stderr and "bug of autoprune" not in result.stderr
    assert result.stderr.count("autoprune: ") == 1

    settings = {"model": "cifar_resnet20", "data": "digits", "budget": "1m", "study": "full"}
    store = StudyStore.create_or_resume(make_config(settings), StudyPaths.of("full"))
    assert store.records() == []
    store.release()


def test_a_bug_says_so_and_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("cannot happen")

    monkeypatch.setattr("autoprune.space.space_files.shipped_spaces", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["spaces"]) == 1
    message = capsys.readouterr().err
    assert "this is a bug of autoprune: ZeroDivisionError: cannot happen" in message
    assert "Traceback" not in message
    (log,) = tmp_path.glob("autoprune-*.log")
    assert str(log) in message
    assert "Traceback" in log.read_text(encoding="utf-8")
    assert main(["spaces", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
