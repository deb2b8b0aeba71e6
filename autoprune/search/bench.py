"""The bench: everything that the trials of one study share, built once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoprune.compress.discovery import cuttable, find_groups
from autoprune.compress.features import check_own_step, feature_layers
from autoprune.compress.finetune import TeacherStream
from autoprune.compress.formats import int8_layers
from autoprune.compress.lineage import groups_after, in_dense_units
from autoprune.compress.lowrank import Factorised, shape_factors, with_factors
from autoprune.compress.pipeline import Compressed, compress
from autoprune.compress.quantization import in_halves
from autoprune.compress.ranking import kept_counts
from autoprune.compress.rounding import rounded
from autoprune.compress.statistics import LayerStatistics, collect_statistics
from autoprune.compress.surgery import prune
from autoprune.config import StudyConfig
from autoprune.deploy.registry import make_runtime
from autoprune.deploy.runtime import Artifact, Runtime
from autoprune.deploy.saturation import int8_bits
from autoprune.errors import CompressionError
from autoprune.measure.capability import score
from autoprune.measure.record import Capability
from autoprune.naming import TARGETS_FOLDER, file_name_of
from autoprune.search.baselines import architecture_key
from autoprune.search.formats import formats_of, stored_weights
from autoprune.search.timings import Timings
from autoprune.space.groups import Groups
from autoprune.space.recipe import Recipe, Recovery
from autoprune.study.artifacts import commit_folder, temporary_folder, usable
from autoprune.study.records import TrialRecord
from autoprune.target import Target
from autoprune.workloads.weights import as_of_today
from autoprune.workloads.workload import Workload

WEIGHTS_FILE = "weights.safetensors"
RECIPE_FILE = "recipe.json"

# Networks whose weights are kept in memory so that a recipe that differs in bits alone is not trained again.
_REMEMBERED_NETWORKS = 8
_REMEMBERED_ANCESTORS = 2
_SCREEN_BATCH = 250


@dataclass(frozen=True)
class Ancestor:
    """A network that recipes cut: the dense one, or one that was cut and recovered before.

    Attributes:
        network: The network, its plan in the dense network's units.
        groups: Its own groups.
        statistics: Its own statistics on calibration data.
    """

    network: Compressed
    groups: Groups
    statistics: LayerStatistics


@dataclass
class Bench:
    """Shared means of all trials.

    Attributes:
        config: Settings of the study.
        workload: Model, data and metric.
        groups: What can be removed.
        statistics: Statistics of the dense network on calibration data.
        calibration: Calibration batches, ``(inputs, targets)``.
        stream: Training batches with the dense network's outputs.
        runtime: Where networks are deployed.
        device: Where networks are trained.
        dense: The dense network's artifact; None until trial 0 built it.
        timings: How long the stages take here.
        by_gradient: Whether networks are ranked by gradients, which those that were trained then need too.
    """

    config: StudyConfig
    workload: Workload
    groups: Groups
    statistics: LayerStatistics
    calibration: list[tuple[Tensor, Tensor]]
    stream: TeacherStream
    runtime: Runtime
    device: torch.device
    dense: Artifact | None = None
    timings: Timings = field(default_factory=Timings)
    by_gradient: bool = True
    _runtimes: dict[str, Runtime] = field(default_factory=dict)
    _networks: dict[str, Compressed] = field(default_factory=dict)
    _ancestors: dict[Path, Ancestor] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        config: StudyConfig,
        workload: Workload,
        groups: Groups,
        *,
        gradients: bool = True,
        by_gradient: bool | None = None,
    ) -> Bench:
        """Collect what the trials share.

        Args:
            config: Settings of the study.
            workload: A dense network that is trained for its data.
            groups: Its groups.
            gradients: Whether the dense network's statistics hold gradients.
            by_gradient: Whether a criterion of the space needs them; as ``gradients`` if not given.
        """
        device = training_device()
        calibration = list(workload.data.calibration.batches(64, limit=config.calibration_examples))
        stream = TeacherStream(
            workload.model, workload.data.train, seed=config.seed, batch_size=config.batch_size, device=device
        )
        statistics = collect_statistics(
            workload.model, groups, calibration, gradients=gradients, loss=workload.loss
        )
        runtime = make_runtime(config.target)
        runtime.prepare(workload.model, calibration[0][0][:2])
        by_gradient = gradients if by_gradient is None else by_gradient
        return cls(
            config,
            workload,
            groups,
            statistics,
            calibration,
            stream,
            runtime,
            device,
            by_gradient=by_gradient,
        )

    @property
    def model_file(self) -> str:
        """Name of the files that networks are deployed in."""
        return self.config.target.facts.model_file

    @property
    def int8_bits(self) -> int:
        """Most bits of the weights that the target's int8 kernels add up rightly here."""
        return int8_bits(self.config.target)

    def int8_layers(self, model: nn.Module, recipe: Recipe) -> list[str]:
        """Return the layers of a network that are to run in int8: those that a recipe asks it of and the target can."""
        return with_factors(model, int8_layers(recipe, self.groups, self.config.target.facts.int8))

    def compressed(
        self, recipe: Recipe, deadline: Callable[[], bool] | None = None, start: Path | None = None
    ) -> Compressed:
        """Return the pruned and recovered network of ``recipe``; equal networks are made once.

        Args:
            recipe: The candidate.
            deadline: Returns True once training has to stop.
            start: Artifact folder of a recovered network that keeps at least as much of every group, which is cut
                further instead of the dense one.
        """
        key = f"{architecture_key(recipe, self.groups)}|{start.name if start else ''}"
        if key in self._networks:
            return self._networks[key]
        begun_s = time.perf_counter()
        before = self._dense_ancestor() if start is None else self.ancestor(start)
        counts: dict[str, int] | None = None
        # Of a network that is tuned first the tuned one's scores say what goes.
        if start is not None or recipe.order == "prune-tune-quantize":
            counts = kept_counts(self.workload.model, self.groups, recipe, self.statistics)
        result = compress(
            before.network.model,
            before.groups,
            recipe,
            statistics=before.statistics,
            calibration_batches=self.calibration,
            stream=self.stream,
            loss=self.workload.loss,
            batch_size=self.config.batch_size,
            device=self.device,
            counts=counts,
            # Batches that the line has not seen yet.
            start_step=before.network.train_steps,
            deadline=deadline,
            training_step=self.workload.training_step,
            int8_kinds=self.config.target.facts.int8,
            int8_bits=self.int8_bits,
        )
        if result.train_steps:
            self.timings.step.append((time.perf_counter() - begun_s) / result.train_steps)
        plan = in_dense_units(before.network.plan, result.plan)
        steps = before.network.train_steps + result.train_steps
        result = replace(result, plan=plan, train_steps=steps)
        while len(self._networks) >= _REMEMBERED_NETWORKS:
            self._networks.pop(next(iter(self._networks)))
        self._networks[key] = result
        return result

    def _dense_ancestor(self) -> Ancestor:
        return Ancestor(Compressed(self.workload.model), self.groups, self.statistics)

    def ancestor(self, folder: Path) -> Ancestor:
        """Return the recovered network that was saved in ``folder`` with what cutting it further needs."""
        if folder not in self._ancestors:
            network = self.load(folder)
            if network.factorised.ranks:
                raise CompressionError(
                    f"the network in {folder.name!r} has low-rank layers, which cannot be cut further",
                    "start from the dense network",
                )
            groups = groups_after(self.workload.model, self.groups, network.plan)
            statistics = collect_statistics(
                network.model, groups, self.calibration, gradients=self.by_gradient, loss=self.workload.loss
            )
            while len(self._ancestors) >= _REMEMBERED_ANCESTORS:
                self._ancestors.pop(next(iter(self._ancestors)))
            self._ancestors[folder] = Ancestor(network, groups, statistics)
        return self._ancestors[folder]

    def screened(self, recipe: Recipe, examples: int | None) -> Capability:
        """Score the network of ``recipe`` after closed-form recovery alone, on the first examples of the search split.

        The network itself is run, with 8 bits simulated where the recipe asks for them; nothing is exported.

        Args:
            recipe: The candidate.
            examples: Most examples to score; all if not given.
        """
        recovery = Recovery.model_validate({**recipe.recovery.model_dump(), "finetune_steps": 0})
        network = self.compressed(recipe.model_copy(update={"recovery": recovery})).model
        outputs, targets = [], []
        # Fewer examples than for a file: many recipes are screened.
        few = [self.calibration[0][0]]
        eight = self.int8_layers(network, recipe)
        kinds = self.config.target.facts.int8
        network, stored = stored_weights(network, recipe, self.groups, few, kinds, self.int8_bits)
        halves = [name for name, stored_as in stored.items() if stored_as.codes is None]
        if halves:
            network = in_halves(network, halves, recipe.quantization.half)
        made = dict.fromkeys(stored, 32)
        model = rounded(network, eight, made, self.int8_bits).to(self.device)
        with torch.no_grad():
            for inputs, target in self.workload.data.search.batches(_SCREEN_BATCH, limit=examples):
                outputs.append(model(inputs.to(self.device)).float().cpu())
                targets.append(target)
        return score(torch.cat(outputs), torch.cat(targets), self.workload.metric)

    def deploy(self, network: Compressed, recipe: Recipe, folder: Path) -> Artifact:
        """Quantize and export a network into ``folder`` as the recipe says."""
        return self._deploy(self.runtime, network, recipe, folder / self.model_file)

    def deploy_dense(self, folder: Path) -> Artifact:
        """Export the dense network into ``folder``."""
        return self.deploy(Compressed(self.workload.model), Recipe(), folder)

    def deploy_on(self, target: Target, network: Compressed, recipe: Recipe, folder: Path) -> Artifact:
        """Quantize and export a network for a further target into its own folder inside of ``folder``."""
        if target.spec not in self._runtimes:
            runtime = make_runtime(target)
            runtime.prepare(self.workload.model, self.calibration[0][0][:2])
            self._runtimes[target.spec] = runtime
        place = folder / TARGETS_FOLDER / file_name_of(target.spec) / target.facts.model_file
        place.parent.mkdir(parents=True, exist_ok=True)
        return self._deploy(self._runtimes[target.spec], network, recipe, place)

    def runtime_of(self, target: Target) -> Runtime:
        """Return the runtime of one of the study's targets."""
        return self.runtime if target == self.config.target else self._runtimes[target.spec]

    def _deploy(self, runtime: Runtime, network: Compressed, recipe: Recipe, path: Path) -> Artifact:
        calibration = [inputs for inputs, _ in self.calibration]
        kinds = runtime.target.facts.int8
        bits = int8_bits(runtime.target)
        model, weights = stored_weights(network.model, recipe, self.groups, calibration, kinds, bits)
        formats = formats_of(model, recipe, self.groups, weights, kinds, network.ranges)
        return runtime.build(model, path, formats, calibration)

    def save(self, compressed: Compressed, recipe: Recipe, folder: Path) -> None:
        """Write the network's weights, and the recipe with the channels that it kept, into ``folder``."""
        state = {
            name: tensor.detach().cpu().contiguous().clone()  # tied weights would share memory
            for name, tensor in compressed.model.state_dict().items()
        }
        try:
            save_file(state, folder / WEIGHTS_FILE)
        except SafetensorError as error:  # a full disk; not a fault of the trial
            raise OSError(f"the weights could not be written: {error}") from error
        content = {
            "recipe": recipe.content(),
            "kept": {name: list(units) for name, units in compressed.plan.items()},
            "ranks": dict(compressed.factorised.ranks),
            "left_whole": dict(compressed.factorised.left_whole),
            "ranges": {name: list(ends) for name, ends in compressed.ranges.items()},
            "train_steps": compressed.train_steps,
            "metric": self.workload.metric.name,
            "data_fingerprint": self.workload.data.fingerprint,
            "settings": self.config.identity(),
        }
        (folder / RECIPE_FILE).write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")

    def adopt_dense(self, folder: Path, record: TrialRecord) -> None:
        """Take the dense trial's artifact as the reference of latency and size; rebuild it if it is gone or damaged."""
        path = folder / self.model_file
        if record.measurement is not None and usable(folder) and path.is_file():
            self.dense = Artifact(path, record.measurement.executed, record.measurement.parity_error)
            return
        unfinished = temporary_folder(folder.parent)
        made = self.deploy_dense(unfinished)
        self.save(Compressed(self.workload.model), Recipe(), unfinished)
        commit_folder(unfinished, folder)
        self.dense = replace(made, path=path)

    def load(self, folder: Path) -> Compressed:
        """Rebuild the network that :meth:`save` wrote into ``folder``."""
        content = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        plan = {name: tuple(units) for name, units in content["kept"].items()}
        model = prune(self.workload.model, self.groups, plan)
        # Artifacts of earlier versions name no ranks and no ranges.
        factorised = Factorised(content.get("ranks", {}), content.get("left_whole", {}))
        shape_factors(model, factorised.ranks)
        model.load_state_dict(as_of_today(model, load_file(folder / WEIGHTS_FILE)))
        steps = int(content["train_steps"])
        ranges = {name: (float(low), float(high)) for name, (low, high) in content.get("ranges", {}).items()}
        return Compressed(model.eval(), plan, steps, [], factorised, ranges)


def training_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_features(wanted: bool, workload: Workload) -> None:
    """Refuse distillation on features that this workload cannot do, before anything is trained.

    Args:
        wanted: Whether any recipe asks for it.
        workload: Model and data; the model may not be trained yet.

    Raises:
        UsageError: If a training step of the user's own makes the loss, or the network has no features to compare.
    """
    if wanted:
        check_own_step(workload.training_step is not None)
        feature_layers(workload.model, two_examples(workload))


def discover(workload: Workload) -> tuple[Workload, Groups]:
    """Find the groups of the workload's network on one of its own inputs.

    Returns:
        The workload, its network written as a graph where that alone can be cut, and the groups.
    """
    groups = find_groups(workload.model, two_examples(workload))
    return as_groups_say(workload, groups), groups


def as_groups_say(workload: Workload, groups: Groups) -> Workload:
    """Return the workload, its network written as a graph where the groups are those of the graph."""
    if not groups.rewritten:
        return workload
    return replace(workload, model=cuttable(workload.model, groups, two_examples(workload)))


def two_examples(workload: Workload) -> Tensor:
    """Return inputs that networks are looked at with."""
    return next(iter(workload.data.calibration.batches(2, limit=2)))[0]
