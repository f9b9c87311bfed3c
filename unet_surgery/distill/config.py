"""What a run file says: pydantic models, and what becomes of ``stages``.

A run has one or more *stages*, one after the other. A file without ``stages`` has one, made of its top-level keys; a
stage takes from the top level what it does not say itself. Every key has one meaning in all of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from unet_surgery.data.conditions import parse_filter
from unet_surgery.errors import UsageError

__all__ = [
    "DataConfig",
    "EmaConfig",
    "FeatureKd",
    "NoiseConfig",
    "Objectives",
    "Optimizer",
    "PictureConfig",
    "RunConfig",
    "Speed",
    "Stage",
    "StepKd",
    "ToyData",
    "TroubleConfig",
]


REFUSED = "refused"
"""The type that pydantic gives to what the models below refuse themselves; its context is what an error shows."""


def _refused(what: str, expected: str, *, at: tuple[str, ...] = (), hint: str | None = None) -> PydanticCustomError:
    """Return the refusal of the value at ``at`` below the model that is checked."""
    context = {"what": what, "expected": expected, "at": at, "hint": hint}
    return PydanticCustomError(REFUSED, "{what}; expected: {expected}", context)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True, allow_inf_nan=False)


Weight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1, max_length=1000)]
Location = Annotated[Text, AfterValidator(os.path.expanduser)]
"""A path, or another name of data; ``~`` is the home folder, which no shell has put in its place."""


class FeatureKd(_Model):
    """Feature distillation: which activations are compared, and how the terms are weighed against each other."""

    weight: Weight = 1.0
    pairs: Literal["bk", "plan", "attn1", "similarity"] = "bk"
    """``bk``: as BK-SDM pairs them; ``plan``: stage outputs and the mid; ``attn1``: outputs of self-attentions;
    ``similarity``: matched by CKA on the first batches, printed and frozen."""
    normalise: Literal["none", "teacher_power"] = "none"
    """``teacher_power``: each term is divided by the mean square of the teacher's activation."""


class StepKd(_Model):
    """Step distillation: one DDIM step of the student lands where several of the teacher's do."""

    weight: Weight = 0.0
    student_steps: Count = 8
    """Steps in which the student is to draw; its timesteps are spaced evenly from the last one down ("trailing")."""
    teacher_steps: Count = 2
    """Steps of the teacher in one of the student's."""
    guided: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The share of optimizer steps in which both networks are guided (arXiv 2306.00980), which takes both twice."""
    guidance: tuple[Weight, Weight] = (2.0, 14.0)
    """Between which the guidance is drawn for each sample, in diffusers' count: 1 is none."""
    task_share: Weight = 0.2
    """The task term beside it: γ, a share of a sample's step term, to whose size it is scaled."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.guidance[0] > self.guidance[1]:
            raise _refused(
                "step_kd is guided between two values that stand the wrong way round",
                "from the lower to the higher",
                at=("guidance",),
                hint=f"guidance: [{self.guidance[1]:g}, {self.guidance[0]:g}]",
            )
        return self


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _weight_alone(value: Any) -> Any:
    """``feature_kd: 1.0`` is short for its weight."""
    return {"weight": value} if isinstance(value, (int, float)) and not isinstance(value, bool) else value


class Objectives(_Model):
    """The terms of the loss and their weights; 0 leaves a term out."""

    task: Weight = 1.0
    output_kd: Weight = 1.0
    feature_kd: Annotated[FeatureKd, BeforeValidator(_weight_alone)] = FeatureKd()
    step_kd: Annotated[StepKd, BeforeValidator(_weight_alone)] = StepKd()
    """Goes with none of the others: they compare at one noise level, and this one's teacher runs through several."""
    min_snr: Annotated[float, Field(gt=0)] | None = None
    """Min-SNR weighting's γ (arXiv 2303.09556), of the task term; the paper takes 5."""

    @property
    def needs_teacher(self) -> bool:
        """True if a term compares with the teacher."""
        return self.output_kd > 0 or self.feature_kd.weight > 0 or self.step_kd.weight > 0

    @property
    def may_be_guided(self) -> bool:
        """True if a step may take both networks with and without the prompt: twice the rows of a batch at once."""
        return self.step_kd.weight > 0 and self.step_kd.guided > 0

    @model_validator(mode="after")
    def _one_at_least(self) -> Self:
        if not (self.task or self.needs_teacher):
            raise _refused(
                "the objectives' weights are all 0",
                "a weight above 0 for one of task, output_kd, feature_kd and step_kd",
                hint="task: 1",
            )
        return self

    @model_validator(mode="after")
    def _steps_alone(self) -> Self:
        if self.step_kd.weight == 0:
            return self
        others = {"task": self.task, "output_kd": self.output_kd, "feature_kd": self.feature_kd.weight}
        given = [name for name, weight in others.items() if weight]
        if given:
            have = f"{', '.join(given)} {'has one' if len(given) == 1 else 'have some'}"
            raise _refused(
                "step_kd goes alone",
                f"no other weights (its share of the task is its task_share), and {have}",
                hint=", ".join(f"{name}: 0" for name in given),
            )
        if self.min_snr is not None:
            raise _refused(
                "min_snr weighs the task term, which step_kd scales by itself",
                "one of the two",
                at=("min_snr",),
                hint="leave min_snr out",
            )
        return self


class Optimizer(_Model):
    """AdamW and its learning rate, in optimizer steps."""

    lr: Annotated[float, Field(gt=0)] = 5e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or falling to 0 at the stage's last step."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps in which the rate rises linearly from 0."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Weight = 1e-2
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """The gradient's largest norm, of all parameters together."""
    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """``adamw8bit``: bitsandbytes' (an extra), for memory."""


class NoiseConfig(_Model):
    """How latents become what the networks see."""

    timesteps: Literal["uniform", "half_high"] = "uniform"
    """``half_high``: each sample, with probability ½, at 1000·u^0.25 in place of 1000·u, where more noise is."""
    offset: Weight = 0.0
    """Noise offset: a share of noise that is the same in a whole channel."""
    caption_drop: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of samples that are trained with an empty caption, for guidance."""


class ToyData(_Model):
    """The toy world's pictures, made when the run begins."""

    count: Count = 4096
    objects: Literal["one", "two", "both"] = "both"
    seed: Annotated[int, Field(ge=0)] = 0


class DataConfig(_Model):
    """Where pictures come from: one of ``cache``, ``images`` and ``toy``."""

    cache: Location | None = None
    """A folder that ``unet-surgery cache`` made."""
    images: Location | None = None
    """An imagefolder with metadata, WebDataset tars (folder or pattern), or ``hub:org/name``: encoded as they come."""
    toy: ToyData | None = None
    resolution: Count = 512
    """Of ``images``: the side to which they are resized and cropped."""
    caption_column: Text = "text"
    filter: Annotated[tuple[Text, ...], BeforeValidator(_as_list)] = ()
    """Of ``images``: only the samples whose metadata meets all of these, such as ``score>=6.5``."""
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Of ``images``: the share that may be broken (they are replaced by others) before the run stops."""
    workers: Count = 2
    """Threads that prepare batches."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("cache", "images", "toy") if getattr(self, name) is not None]
        if len(given) != 1:
            raise _refused(
                f"{' and '.join(given)} are given as data" if given else "no data is given",
                "one of cache, images and toy",
                hint=f"take one out, such as by --set data.{given[0]}=null" if given else "data: {cache: ./latents}",
            )
        if self.filter and self.images is None:
            raise _refused(
                f"data.filter stands beside {given[0]}",
                "images, or no filter",
                hint="a cache is filtered when it is made: unet-surgery cache --filter",
            )
        for text in self.filter:
            try:
                parse_filter(text)
            except UsageError as error:
                raise _refused(
                    f"{error.what}: {error.found}", str(error.expected), at=("filter",), hint=error.hint
                ) from error
        return self


class Speed(_Model):
    """What costs or saves time and memory, and changes results in rounding only."""

    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of weights and activations; with the two short ones, the optimizer works on fp32 copies."""
    compile: bool = False
    """torch.compile of both networks: slow to begin, faster from then on."""
    channels_last: bool = True
    autotune: bool = True
    """Let cuDNN time its kernels and keep the fastest."""
    deterministic: bool = False
    """Only kernels that give the same bits every time, so that a resume on a GPU is exact; slower."""
    checkpointing: Literal["none", "high_resolution", "full"] = "none"
    """Recompute activations in the backward: of the first level only, or of all; saves memory, costs time."""


class EmaConfig(_Model):
    """The running average of the weights, which is what the student folder gets."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    every: Count = 10
    """Steps between two updates; the decay is of one step."""
    warmup: bool = True
    """Begin with smaller decays: (1 + step) / (10 + step)."""


class PictureConfig(_Model):
    """Pictures of fixed prompts: teacher, student and its average, side by side."""

    every: Count | None = None
    """Steps between two grids; none: only at the end, where prompts are given."""
    prompts: tuple[Text, ...] = ()
    steps: Count = 25
    guidance: Weight = 7.5
    seed: Annotated[int, Field(ge=0)] = 0
    scheduler: Text | None = None
    """A diffusers scheduler by name; none: the pipeline's own."""


class SaveConfig(_Model):
    """Checkpoints of the whole training state."""

    every: Count = 1000
    keep: Count = 2


class LogConfig(_Model):
    """When the device is asked for losses, and who else hears of them; metrics.jsonl always does."""

    every: Count = 50
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    project: Text = "unet-surgery"
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """The device's dense rate in the training dtype, for model FLOP use; none: from a table of devices."""


class TroubleConfig(_Model):
    """What is done about steps whose gradients are not finite. They are never applied."""

    max_in_a_row: Count = 20
    """More of them in a row: back to the last checkpoint, and on with other noise."""
    max_roll_backs: Annotated[int, Field(ge=0)] = 3
    """After these the run stops, and says what it saw."""


class Stage(_Model):
    """A part of a run with its own teacher, terms, rate and length."""

    name: Text = "main"
    steps: Count = 50_000
    """Optimizer steps."""
    batch: Count = 256
    """Samples an optimizer step, over all processes and accumulated micro-batches."""
    teacher: Text | None = None
    """A folder, a built-in name or a Hub id; not needed where only the task counts."""
    objectives: Objectives = Objectives()
    optimizer: Optimizer = Optimizer()
    noise: NoiseConfig = NoiseConfig()

    @model_validator(mode="after")
    def _has_its_teacher(self) -> Self:
        if self.objectives.needs_teacher and self.teacher is None:
            raise _refused(
                "output_kd, feature_kd and step_kd need a teacher",
                "teacher: a folder, a built-in name or a Hub id",
                at=("teacher",),
                hint="name one, or give them the weight 0",
            )
        return self

    @model_validator(mode="after")
    def _stands_on_the_ladder(self) -> Self:
        if self.objectives.step_kd.weight and self.noise.timesteps != "uniform":
            raise _refused(
                "step_kd has timesteps of its own, the student's",
                "noise.timesteps stays uniform",
                at=("noise", "timesteps"),
                hint="noise: {timesteps: uniform}",
            )
        return self

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> Self:
        if self.optimizer.schedule != "constant" and self.optimizer.warmup >= self.steps:
            raise _refused(
                f"the warm-up of {self.optimizer.warmup} steps takes all of the {self.steps}",
                f"fewer than {self.steps} steps: after them the rate falls",
                at=("optimizer", "warmup"),
                hint="a shorter warmup, or schedule: constant",
            )
        return self


_OF_A_STAGE = tuple(name for name in Stage.model_fields if name != "name")


class RunConfig(_Model):
    """A whole run, as checked. ``stages`` is always filled in; see :meth:`from_data`."""

    output: Location
    """The run's folder: checkpoints, metrics, pictures, and the finished student."""
    student: Text
    """A pruned folder with its plan.json, or any pipeline or U-Net folder or name where no feature is matched."""
    base: Text | None = None
    """A pipeline that brings VAE, text encoder, tokenizer and scheduler; none: the student's own, or the teacher's."""
    init: Literal["weights", "random"] = "weights"
    """``random``: forget the student's weights, for ablations and for training a network from nothing."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataConfig
    micro_batch: Count | None = None
    """Samples in memory at once in each process; none: the whole batch, divided by the processes."""
    stages: Annotated[tuple[Stage, ...], Field(min_length=1, max_length=20)]
    speed: Speed = Speed()
    ema: EmaConfig = EmaConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()
    pictures: PictureConfig = PictureConfig()
    trouble: TroubleConfig = TroubleConfig()

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> RunConfig:
        """Check a run file's ``data``; keys of a stage at the top level are taken by every stage that lacks them.

        Raises:
            pydantic.ValidationError: a key is unknown, missing or has a wrong value.
        """
        return cls.model_validate(with_stages(data))

    @property
    def run_name(self) -> str:
        """What others call the run: the last part of its folder's path."""
        return self.output.rstrip("/").rpartition("/")[2] or "run"

    @property
    def num_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def num_samples(self) -> int:
        """Samples of all stages."""
        return sum(stage.steps * stage.batch for stage in self.stages)


def with_stages(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``data`` with the stage's keys of the top level moved into its stages."""
    shared = {key: data[key] for key in _OF_A_STAGE if key in data}
    own = {key: value for key, value in data.items() if key not in _OF_A_STAGE}
    stages = own.get("stages")
    if stages is None:
        return {**own, "stages": [shared]}
    if isinstance(stages, (list, tuple)):
        own["stages"] = [merged(shared, stage) if isinstance(stage, Mapping) else stage for stage in stages]
    return own


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``below`` with the keys of ``above`` written over it, mapping by mapping."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
