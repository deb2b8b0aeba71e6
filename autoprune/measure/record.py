"""Measurement: what was measured of one artifact. Torch-free; it crosses into studies and reports."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Interval = tuple[float, float]
EnergySource = Literal["rapl", "nvml"]
RUN_FIGURES = ("memory_bytes", "cold_start_ms", "throughput_per_s", "energy_mj")


class GpuState(BaseModel):
    """State of a GPU before and after the runs of a measurement.

    Attributes:
        sm_mhz: Lowest and highest clock of its processors that was read.
        memory_mhz: The same of its memory.
        temperature_c: Highest temperature of the chip, degrees Celsius.
        throttled: Why it ran slower than it can, if it did.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sm_mhz: tuple[int, int]
    memory_mhz: tuple[int, int]
    temperature_c: int
    throttled: tuple[str, ...] = ()


class Latency(BaseModel):
    """Latency of a candidate and the dense model, measured interleaved in one process.

    Attributes:
        latency_ms: Median over runs (p50), milliseconds for one batch.
        latency_p95_ms: 95th percentile; None below the number of samples that it needs.
        dense_ms: Median of the dense model in the same session, milliseconds.
        ratio: Centre of paired ratios candidate / dense, of each session's median; below 1 is faster.
        ratio_ci: Its 95 % interval over sessions.
        samples: Timed runs of the candidate.
        noisy: Whether the spread was above the protocol's limit after all repeats, or a GPU was throttled.
        gpu: State of the GPU; None on the processor, and where ``nvidia-ml-py`` is not there to read it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    latency_ms: float
    latency_p95_ms: float | None
    dense_ms: float
    ratio: float
    ratio_ci: Interval
    samples: int
    noisy: bool
    gpu: GpuState | None = None


class RunFigures(BaseModel):
    """What running a model file takes besides its latency, measured in the session of the latency.

    Nothing is estimated: what was not read is None, and ``missing`` says why.

    Attributes:
        memory_bytes: Peak memory that loading the runtime, opening the file and a few inferences of the target's batch
            add to a fresh process.
        cold_start_ms: Milliseconds from opening the file to the first result of the target's batch, the median of
            several processes that had opened nothing before. Python and the runtime's library are loaded by then, and
            the file is in the system's cache; what the runtime loads or compiles for a file counts.
        throughput_per_s: Examples per second, one inference after another on the target's threads, at the best batch.
        throughput_batch: That batch.
        energy_mj: Millijoules of one example at the target's batch: all that the processor's packages and their memory,
            or the GPU, used meanwhile. What they use when idle is not taken off.
        energy_source: The counter: ``rapl`` or ``nvml``.
        missing: By name of a figure that is None, why.
        dense: The dense network's, of the same session; None where they were not measured, and in its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    memory_bytes: int | None = None
    cold_start_ms: float | None = None
    throughput_per_s: float | None = None
    throughput_batch: int | None = None
    energy_mj: float | None = None
    energy_source: EnergySource | None = None
    missing: dict[str, str] = {}
    dense: RunFigures | None = None

    def why(self, name: str) -> str:
        """Return why a figure is None; empty where it is not."""
        return self.missing.get(name, "it was not measured") if getattr(self, name) is None else ""

    def flat(self) -> dict[str, Any]:
        """Return the figures with the names that scripts rely on, the dense network's beside them."""
        names = (*RUN_FIGURES, "throughput_batch")
        dense = self.dense or RunFigures()
        return {
            **{name: getattr(self, name) for name in (*names, "energy_source")},
            **{f"dense_{name}": getattr(dense, name) for name in names},
            "not_measured": {name: why for name in RUN_FIGURES if (why := self.why(name))},
        }


class Capability(BaseModel):
    """Score of an artifact on one split.

    Attributes:
        name: Name of the metric, such as ``accuracy``; higher is better.
        value: The score; for accuracy a fraction in ``[0, 1]``.
        ci: 95 % interval.
        examples: Number of examples scored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    value: float
    ci: Interval
    examples: int


class Executed(BaseModel):
    """What the runtime really executes, read back from its optimised graph.

    Attributes:
        layers: Convolution and linear layers in the exported graph.
        int8_layers: Those that run in int8.
        asked_int8: Those that the recipe asked to run in int8.
        operators: Count of nodes by operator in the optimised graph.
        not_as_asked: Layers that run in something else than was asked for.
        asked: Count of layers by what they were to run in, such as ``int8``, ``4 bit weights`` or ``float32``.
        ran: Count of layers by what they run in.
        reasons: By layer of ``not_as_asked`` what became of it.
        stored_layers: Count of layers by the bit-width of their weights' values, where that is not the one they are
            computed with by default: 32 in float, 8 in int8. They are stored so wherever that makes the file smaller.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int
    int8_layers: int
    asked_int8: int
    operators: dict[str, int]
    not_as_asked: tuple[str, ...] = ()
    asked: dict[str, int] = {}
    ran: dict[str, int] = {}
    reasons: dict[str, str] = {}
    stored_layers: dict[str, int] = {}

    @property
    def as_asked(self) -> float:
        """Share of the layers that run as asked, in ``[0, 1]``; those outside of the network's layers count too."""
        return 1.0 - len(self.not_as_asked) / max(1, self.layers)


class Measurement(BaseModel):
    """All that was measured of one artifact.

    Attributes:
        search: Capability on the search split.
        report: Capability on the report split; None until the final re-measurement.
        latency: Latency on the target.
        size_bytes: Bytes of the model file on disk.
        size_ratio: The same as a share of the dense file.
        params: Parameters of the network.
        macs: Multiply-accumulates of one example.
        executed: What the runtime executes.
        parity_error: Largest difference from the network's outputs, relative to their largest magnitude.
        figures: What running it takes besides its latency.
        elsewhere: The same on further targets of the study, by the target's word.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    search: Capability
    report: Capability | None
    latency: Latency
    size_bytes: int
    size_ratio: float
    params: int
    macs: int
    executed: Executed
    parity_error: Annotated[float, Field(allow_inf_nan=True)]
    figures: RunFigures = RunFigures()
    elsewhere: dict[str, Measurement] = {}

    @model_validator(mode="before")
    @classmethod
    def _memory_of_earlier_versions(cls, values: Any) -> Any:
        """Take the peak memory from where earlier versions recorded it, which measured nothing else of this."""
        if not isinstance(values, dict) or "memory_bytes" not in values:
            return values
        values = dict(values)
        return {"figures": {"memory_bytes": values.pop("memory_bytes")}, **values}


class ClassScore(BaseModel):
    """Top-1 accuracy on the examples of one class.

    Attributes:
        name: Name of the class.
        index: Its number.
        value: Share of its examples that are right, in ``[0, 1]``.
        ci: 95 % interval.
        examples: Number of its examples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    index: int
    value: float
    ci: Interval
    examples: int


class CorruptedScore(BaseModel):
    """Scores on images that were corrupted in one way.

    Attributes:
        corruption: What was done to the images.
        severity: How much, 1 to 5; 0 is nothing.
        accuracy: Top-1 accuracy.
        worst_class: The class with the lowest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    corruption: str
    severity: int
    accuracy: Capability
    worst_class: ClassScore


class Robustness(BaseModel):
    """What one network is worth on corrupted images.

    Attributes:
        clean: Scores on the images as they are.
        corrupted: Scores by corruption and severity.
        seed: Seed of the noise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    clean: CorruptedScore
    corrupted: tuple[CorruptedScore, ...]
    seed: int

    @property
    def corruptions(self) -> tuple[str, ...]:
        """Names of the corruptions, each once."""
        return tuple(dict.fromkeys(score.corruption for score in self.corrupted))

    def mean(self, corruption: str | None = None) -> float:
        """Return the mean accuracy over the severities of one corruption, or over all that was corrupted."""
        found = [s.accuracy.value for s in self.corrupted if corruption in (None, s.corruption)]
        return sum(found) / len(found)
