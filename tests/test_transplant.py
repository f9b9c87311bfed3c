"""A teacher's LoRA for its student: every format, loaded by diffusers, value for value; and what must be refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from configs import CONFIGS
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from teachers import entries, write_unet
from test_cli import tool

import unet_surgery
from unet_surgery import Recipe
from unet_surgery.api import TransplantResult, transplant
from unet_surgery.checkpoint.check import planned_graphs, read_plan
from unet_surgery.errors import OutputError, SurgeryError, TeacherError, UsageError, VerificationError
from unet_surgery.lower import module_moves

Tensors = dict[str, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]
RANK = 2
LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def targets(unet: UNet2DConditionModel, *, convolutions: bool) -> dict[str, torch.Size]:
    kinds = (torch.nn.Linear, torch.nn.Conv2d) if convolutions else (torch.nn.Linear,)
    return {name: m.weight.shape for name, m in unet.named_modules() if isinstance(m, kinds)}


def random_pairs(unet: UNet2DConditionModel, *, convolutions: bool, only: tuple[str, ...] = ("",)) -> dict[str, Pair]:
    noise = torch.Generator().manual_seed(0)
    pairs = {}
    for name, shape in targets(unet, convolutions=convolutions).items():
        if name.endswith(only):
            down = torch.randn(RANK, *shape[1:], generator=noise)
            up = torch.randn(shape[0], RANK, *[1 for _ in shape[2:]], generator=noise)
            pairs[name] = (down, up)
    return pairs


def dotted(prefix: str, down: str, up: str) -> Callable[[dict[str, Pair]], Tensors]:
    return lambda pairs: {
        f"{prefix}{name}.{end}": tensor
        for name, pair in pairs.items()
        for end, tensor in zip((down, up), pair, strict=True)
    }


def processors(pairs: dict[str, Pair]) -> Tensors:
    """Write attention layers as diffusers did before PEFT."""
    tensors = {}
    for name, pair in pairs.items():
        owner, _, part = name.partition(".to_")
        for way, tensor in zip(("down", "up"), pair, strict=True):
            tensors[f"unet.{owner}.processor.to_{part.removesuffix('.0')}_lora.{way}.weight"] = tensor
    return tensors


def kohya(pairs: dict[str, Pair], name_of: Callable[[str], str] = lambda name: name.replace(".", "_")) -> Tensors:
    tensors = {}
    for name, (down, up) in pairs.items():
        module = f"lora_unet_{name_of(name)}"
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        tensors[f"{module}.alpha"] = torch.tensor(float(RANK))
    return tensors


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# format → how it is written, what it adapts, and whether convolutions as well
FORMATS: dict[str, tuple[Callable[[dict[str, Pair]], Tensors], tuple[str, ...], bool]] = {
    "peft": (dotted("unet.", "lora_A.weight", "lora_B.weight"), ("",), True),
    "diffusers": (dotted("unet.", "lora.down.weight", "lora.up.weight"), ("",), False),
    "processors": (processors, ATTENTION, False),
    "kohya": (kohya, (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"), True),
    "locon": (kohya, ("conv1", "conv2", "time_emb_proj", "conv_shortcut", "samplers.0.conv", "to_q"), True),
}


@contextmanager
def silent_diffusers() -> Iterator[None]:
    """Fail if diffusers or PEFT say anything: what they warn of here is a tensor that has no place, or none."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    said = [record.getMessage() for record in records]
    assert not [text for text in said if "No LoRA keys associated to CLIPTextModel" not in text]


@pytest.fixture(scope="module")
def teacher(tiny: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny / "unet")


@pytest.fixture(scope="module")
def students(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines without a layer a stage; without deep stages; with bypassed attentions."""
    root = tmp_path_factory.mktemp("students")
    bypass = Recipe(name="bypass", remove=("down.0.attentions.0", "up.3.attentions.1", "mid.attentions.0"))
    for name, recipe in {"bk_base": "bk_base", "bk_tiny": "bk_tiny", "bypass": bypass}.items():
        unet_surgery.prune(recipe, tiny, root / name)
    return {name: root / name for name in ("bk_base", "bk_tiny", "bypass")}


@pytest.fixture(scope="module")
def pipelines(students: dict[str, Path]) -> dict[str, StableDiffusionPipeline]:
    return {name: StableDiffusionPipeline.from_pretrained(folder) for name, folder in students.items()}


@pytest.fixture(autouse=True)
def _without_adapters(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "pipelines" in request.fixturenames:
        for pipeline in request.getfixturevalue("pipelines").values():
            pipeline.unload_lora_weights()


def expected_pairs(student: Path, pairs: dict[str, Pair]) -> dict[str, Pair]:
    plan = read_plan(student)
    moves = module_moves(*planned_graphs(plan, ""), plan.unused, plan.removed)
    return {moves.kept[name]: pair for name, pair in pairs.items() if name in moves.kept}


def assert_holds(unet: UNet2DConditionModel, pairs: dict[str, Pair]) -> None:
    """The adapter of ``unet`` has exactly ``pairs``, which are not few."""
    loaded = get_peft_model_state_dict(unet, adapter_name=next(iter(unet.peft_config)))
    loaded = {name.removeprefix("base_model.model."): tensor for name, tensor in loaded.items()}
    assert len(pairs) > 10
    assert loaded.keys() == {f"{name}.lora_{half}.weight" for name in pairs for half in "AB"}
    for name, (down, up) in pairs.items():
        assert torch.equal(loaded[f"{name}.lora_A.weight"], down), name
        assert torch.equal(loaded[f"{name}.lora_B.weight"], up), name


@pytest.mark.parametrize("student", ["bk_base", "bk_tiny", "bypass"])
@pytest.mark.parametrize("form", sorted(FORMATS))
def test_diffusers_loads_every_format(
    form: str,
    student: str,
    teacher: UNet2DConditionModel,
    students: dict[str, Path],
    pipelines: dict[str, StableDiffusionPipeline],
    tmp_path: Path,
) -> None:
    write, only, convolutions = FORMATS[form]
    pairs = random_pairs(teacher, convolutions=convolutions, only=only)
    save_file(write(pairs), tmp_path / "style.safetensors")
    result = transplant(tmp_path / "style.safetensors", students[student], tmp_path / "out.safetensors")
    want = expected_pairs(students[student], pairs)
    pipeline = pipelines[student]
    with silent_diffusers():
        pipeline.load_lora_weights(tmp_path / "out.safetensors")
    assert_holds(pipeline.unet, want)
    assert sorted(result.transplant.modules) == sorted(want)
    dropped = [name for names in result.transplant.dropped.values() for name in names]
    assert sorted(dropped) == sorted(name for name in pairs if name not in moved(students[student]))
    assert pipeline.get_list_adapters() == {"unet": ["default_0"]}


def moved(student: Path) -> dict[str, str]:
    plan = read_plan(student)
    return dict(module_moves(*planned_graphs(plan, ""), plan.unused, plan.removed).kept)


def test_a_bypassed_attention_stays_silent(
    teacher: UNet2DConditionModel, students: dict[str, Path], tmp_path: Path
) -> None:
    """What stock diffusers must still hold of it has names that a LoRA knows: none of them may come back to life."""
    pairs = random_pairs(teacher, convolutions=True)
    save_file(dotted("unet.", "lora_A.weight", "lora_B.weight")(pairs), tmp_path / "a.safetensors")
    result = transplant(tmp_path / "a.safetensors", students["bypass"], tmp_path / "b.safetensors").transplant
    gone = ("down_blocks.0.attentions.0.", "up_blocks.3.attentions.1.", "mid_block.attentions.0.")
    assert not [name for name in load_file(tmp_path / "b.safetensors") if name.removeprefix("unet.").startswith(gone)]
    assert result.dropped.keys() == {"down.0.attentions.0", "up.3.attentions.1", "mid.attentions.0"}
    assert "down_blocks.0.attentions.0.proj_in" in result.dropped["down.0.attentions.0"]
    assert "down_blocks.0.attentions.0.proj_out" in result.dropped["down.0.attentions.0"]


@pytest.mark.parametrize("prefix", ["base_model.model.", ""], ids=["peft's own prefix", "no prefix"])
def test_bare_peft(prefix: str, teacher: UNet2DConditionModel, students: dict[str, Path], tmp_path: Path) -> None:
    pairs = random_pairs(teacher, convolutions=True)
    save_file(dotted(prefix, "lora_A.weight", "lora_B.weight")(pairs), tmp_path / "style.safetensors")
    transplant(tmp_path / "style.safetensors", students["bk_tiny"], tmp_path / "out.safetensors")
    tensors = load_file(tmp_path / "out.safetensors")
    want = expected_pairs(students["bk_tiny"], pairs)
    assert tensors.keys() == {f"{prefix}{name}.lora_{half}.weight" for name in want for half in "AB"}
    unet = UNet2DConditionModel.from_pretrained(students["bk_tiny"] / "unet")
    with silent_diffusers():
        unet.load_lora_adapter({name.removeprefix(prefix): t for name, t in tensors.items()}, prefix=None)
    assert_holds(unet, want)


@pytest.mark.parametrize("student", ["bk_base", "bk_tiny", "bypass"])
@pytest.mark.parametrize("names", [LINEAR, ["to_q", "proj_in"], "whole", r".*attn1\.to_[qkv]"], ids=str)
def test_what_diffusers_itself_writes(
    names: list[str] | str,
    student: str,
    tiny: Path,
    students: dict[str, Path],
    pipelines: dict[str, StableDiffusionPipeline],
    tmp_path: Path,
) -> None:
    """save_lora_weights with PEFT's config: names, ends of names and patterns, ranks and alphas of single modules."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny)
    whole = [name for name in targets(pipeline.unet, convolutions=False) if ".attn2.to_" in name]
    special = "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_q"
    extra = {} if names == "whole" else {"rank_pattern": {special: 3}, "alpha_pattern": {special: 7, "to_q": 5}}
    config = LoraConfig(r=RANK, lora_alpha=4, target_modules=whole if names == "whole" else names, **extra)
    pipeline.unet.add_adapter(config)
    torch.manual_seed(0)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    state = get_peft_model_state_dict(pipeline.unet)
    metadata = pipeline.unet.peft_config["default"].to_dict()
    metadata = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in metadata.items()}
    pipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=state, unet_lora_adapter_metadata=metadata)
    transplant(tmp_path / "lora", students[student], tmp_path / "out.safetensors")
    small = pipelines[student]
    with silent_diffusers():
        small.load_lora_weights(tmp_path / "out.safetensors", adapter_name="default")
    moves = moved(students[student])
    split = {tuple(name.rsplit(".lora_", 1)): tensor for name, tensor in state.items()}
    want = {f"{moves[name]}.lora_{end}": t for (name, end), t in split.items() if name in moves}
    loaded = get_peft_model_state_dict(small.unet)
    assert loaded.keys() == want.keys()
    assert len(want) > 10
    assert all(torch.equal(loaded[name], want[name]) for name in want)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path / "lora", adapter_name="default")  # which sorts the patterns: the first counts
    scales = {name: m.scaling["default"] for name, m in pipeline.unet.named_modules() if hasattr(m, "scaling")}
    ours = {name: m.scaling["default"] for name, m in small.unet.named_modules() if hasattr(m, "scaling")}
    assert ours == {moves[name]: scale for name, scale in scales.items() if name in moves}


def test_merging_and_surgery_commute(tiny: Path, teacher: UNet2DConditionModel, tmp_path: Path) -> None:
    """The student of the teacher with the LoRA merged is the student with the transplanted LoRA merged, bit for bit."""
    pairs = random_pairs(teacher, convolutions=True)
    save_file(kohya_or_peft(pairs), tmp_path / "style.safetensors")
    student = unet_surgery.prune("bk_tiny", tiny, tmp_path / "student", unet_only=True).folder
    transplant(tmp_path / "style.safetensors", student, tmp_path / "out.safetensors")
    merged = UNet2DConditionModel.from_pretrained(tiny / "unet")
    merge(merged, tmp_path / "style.safetensors").save_pretrained(tmp_path / "merged")
    first = unet_surgery.prune("bk_tiny", tmp_path / "merged", tmp_path / "first").folder
    second = merge(UNet2DConditionModel.from_pretrained(student), tmp_path / "out.safetensors").state_dict()
    wanted = load_file(first / "diffusion_pytorch_model.safetensors")
    plain = load_file(student / "diffusion_pytorch_model.safetensors")
    assert wanted.keys() == second.keys()
    assert all(torch.equal(wanted[name], second[name]) for name in wanted)
    assert sum(not torch.equal(wanted[name], plain[name]) for name in wanted) == len(expected_pairs(student, pairs))


def kohya_or_peft(pairs: dict[str, Pair]) -> Tensors:
    return dotted("unet.", "lora_A.weight", "lora_B.weight")(pairs)


def merge(unet: UNet2DConditionModel, file: Path) -> UNet2DConditionModel:
    unet.load_lora_adapter(load_file(file), prefix="unet")
    unet.fuse_lora()
    unet.unload_lora()
    return unet


# --- the original (sgm) names ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[UNet2DConditionModel, Path, Path]:
    """A small SDXL: its U-Net, its student without a layer a stage, and its student without attentions in stage 1."""
    root = tmp_path_factory.mktemp("large")
    folder = write_unet(root / "teacher", CONFIGS["sdxl"])
    layers = Recipe(name="layers", remove=("mid", "down.*.layers.1", "up.*.layers.1"))
    blocks = Recipe(
        name="blocks",
        remove=(
            "up.0.attentions.*.transformer_blocks.1-8",
            "down.2.attentions.*.transformer_blocks.1-8",
            "mid.attentions.0.transformer_blocks.1-8",
        ),
    )
    for recipe in (layers, blocks):
        unet_surgery.prune(recipe, folder, root / recipe.name)
    return UNet2DConditionModel.from_pretrained(folder), root / "layers", root / "blocks"


SGM = {
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
    "down_blocks.2.resnets.0.conv_shortcut": "input_blocks_7_0_skip_connection",
    "down_blocks.2.resnets.0.time_emb_proj": "input_blocks_7_0_emb_layers_1",
    "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj": "middle_block_1_transformer_blocks_9_ff_net_0_proj",
    "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
    "up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_out.0":
        "output_blocks_2_1_transformer_blocks_9_attn2_to_out_0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.2.resnets.2.conv1": "output_blocks_8_0_in_layers_2",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
}  # fmt: skip


@pytest.mark.parametrize("student", [0, 1], ids=["layers", "blocks"])
def test_original_names_become_diffusers_names(
    student: int, large: tuple[UNet2DConditionModel, Path, Path], tmp_path: Path
) -> None:
    """diffusers reads the student's file, of diffusers' names: the teacher's values, at the places of the plan."""
    unet, *folders = large
    folder = folders[student]
    pairs = {name: pair for name, pair in random_pairs(unet, convolutions=True).items() if name in SGM}
    assert pairs.keys() == SGM.keys()
    tensors = kohya(pairs, SGM.__getitem__)
    save_file({**tensors, "lora_te2_text_projection.lora_down.weight": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    result = transplant(tmp_path / "a.safetensors", folder, tmp_path / "b.safetensors")
    assert result.transplant.num_text_tensors == 1
    ours = load_file(tmp_path / "b.safetensors")
    assert "lora_te2_text_projection.lora_down.weight" in ours
    ours.pop("lora_te2_text_projection.lora_down.weight")
    small = UNet2DConditionModel.from_pretrained(folder)
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(ours, unet_config=small.config)
    with silent_diffusers():
        small.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    loaded = {
        n.removeprefix("base_model.model."): t
        for n, t in get_peft_model_state_dict(small, adapter_name="default_0").items()
    }
    want = expected_pairs(folder, pairs)
    assert loaded.keys() == {f"{name}.lora_{half}.weight" for name in want for half in "AB"}
    assert all(torch.equal(loaded[f"{name}.lora_A.weight"], down) for name, (down, _) in want.items())
    assert len(want) >= 8


def test_sgm_names_agree_with_diffusers(large: tuple[UNet2DConditionModel, Path, Path], tmp_path: Path) -> None:
    """Every attention layer of the teacher, by diffusers' own translation of the original names."""
    from unet_surgery.lower.original import layer_names

    unet, folder, _ = large
    graph = planned_graphs(read_plan(folder), "")[0]
    pairs = {n: p for n, p in random_pairs(unet, convolutions=True).items() if ".attentions." in n or ".resnets." in n}
    names = {name: original for name, original in layer_names(graph).items() if name in pairs}
    assert names.keys() == pairs.keys()
    assert len(names) > 400
    tensors = kohya(pairs, lambda name: names[name].replace(".", "_"))
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(tensors), unet_config=unet.config)
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    try:
        assert_holds(unet, pairs)
    finally:
        unet.unload_lora()


# --- other adapters --------------------------------------------------------------------------------------------------


def lokr(weight: torch.Size) -> Tensors:
    out, inputs = weight[0], weight[1]
    return {
        "lokr_w1": torch.randn(2, 2),
        "lokr_w2_a": torch.randn(out // 2, 2),
        "lokr_w2_b": torch.randn(2, inputs // 2),
    }


def loha(weight: torch.Size) -> Tensors:
    inputs = weight[1:].numel()
    return {
        f"hada_w{k}_{half}": torch.randn(*shape)
        for k in "12"
        for half, shape in (("a", (weight[0], 2)), ("b", (2, inputs)))
    }


def dora(weight: torch.Size) -> Tensors:
    pair = {"lora_A.weight": torch.randn(2, weight[1]), "lora_B.weight": torch.randn(weight[0], 2)}
    return {**pair, "lora_magnitude_vector": torch.randn(weight[0])}


KINDS = {
    "LoKr": (lokr, "lora_unet_{}", "_"),
    "LoHa": (loha, "lora_unet_{}", "_"),
    "LoKr, dotted": (lokr, "unet.{}", "."),
    "DoRA": (dora, "unet.{}", "."),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_other_adapters_are_renamed_alike(
    kind: str, teacher: UNet2DConditionModel, students: dict[str, Path], tmp_path: Path
) -> None:
    make, form, dot = KINDS[kind]
    torch.manual_seed(0)
    shapes = {n: s for n, s in targets(teacher, convolutions=False).items() if n.endswith("to_q")}
    tensors = {f"{form.format(n.replace('.', dot))}.{end}": t for n, s in shapes.items() for end, t in make(s).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    transplant(tmp_path / "a.safetensors", students["bk_tiny"], tmp_path / "b.safetensors")
    ours = load_file(tmp_path / "b.safetensors")
    moves = moved(students["bk_tiny"])
    want = {
        f"{form.format(moves[n].replace('.', dot))}.{end}": tensors[f"{form.format(n.replace('.', dot))}.{end}"]
        for n, s in shapes.items()
        if n in moves
        for end in make(s)
    }
    assert ours.keys() == want.keys()
    assert all(torch.equal(ours[name], want[name]) for name in want)
    assert len(want) > 10


def test_dora_loads(
    teacher: UNet2DConditionModel,
    students: dict[str, Path],
    pipelines: dict[str, StableDiffusionPipeline],
    tmp_path: Path,
) -> None:
    shapes = {n: s for n, s in targets(teacher, convolutions=False).items() if n.endswith("to_q")}
    save_file(
        {f"unet.{n}.{end}": t for n, s in shapes.items() for end, t in dora(s).items()}, tmp_path / "a.safetensors"
    )
    transplant(tmp_path / "a.safetensors", students["bk_tiny"], tmp_path / "b.safetensors")
    pipeline = pipelines["bk_tiny"]
    with silent_diffusers():
        pipeline.load_lora_weights(tmp_path / "b.safetensors")
    assert any("lora_magnitude_vector" in name for name in pipeline.unet.state_dict())


# --- the file --------------------------------------------------------------------------------------------------------


def lora_file(teacher: UNet2DConditionModel, path: Path, metadata: dict[str, str] | None = None) -> Path:
    pairs = random_pairs(teacher, convolutions=False, only=ATTENTION)
    tensors = {name: t.to(torch.bfloat16) if "_q" in name else t for name, t in kohya(pairs).items()}
    save_file(tensors, path, metadata=metadata)
    return path


def test_order_metadata_and_bytes_stay(
    teacher: UNet2DConditionModel, students: dict[str, Path], tmp_path: Path
) -> None:
    metadata = {"ss_network_dim": "2", "ss_output_name": "style", "modelspec.title": "x"}
    file = lora_file(teacher, tmp_path / "style.safetensors", metadata)
    first = transplant(file, students["bk_tiny"], tmp_path / "a.safetensors")
    transplant(file, students["bk_tiny"], tmp_path / "b.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    assert data == (tmp_path / "b.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header.pop("__metadata__") == metadata
    assert list(header) == list(first.transplant.names.values())
    assert len(first.transplant.names) + first.transplant.num_dropped_tensors == len(load_file(file))


def test_command_line(teacher: UNet2DConditionModel, students: dict[str, Path], tmp_path: Path) -> None:
    lora_file(teacher, tmp_path / "style.safetensors")
    out, err = tool("transplant", "style.safetensors", "--plan", str(students["bk_tiny"]), cwd=tmp_path)
    assert out == "style-bk_tiny.safetensors\n"
    assert "72 of 128 modules of the U-Net" in err
    assert "dropped with down.*.layers.1: down_blocks.0.attentions.1." in err
    _, err = tool("transplant", "style.safetensors", "--plan", str(students["bk_tiny"]), cwd=tmp_path, code=4)
    assert "the output exists" in err
    words = ("transplant", "style.safetensors", "--plan", str(students["bk_tiny"] / "plan.json"), "--force", "--json")
    data = json.loads(tool(*words, cwd=tmp_path)[0])
    assert (data["kept_modules"], data["dropped_modules"], data["recipe"]) == (72, 56, "bk_tiny")
    assert sum(map(len, data["dropped"].values())) == 56
    assert entries(tmp_path) == ["style-bk_tiny.safetensors", "style.safetensors"]


def one(name: str, *shape: int) -> Callable[[], Tensors]:
    return lambda: {name: torch.ones(*shape)}


Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
REFUSED: dict[str, tuple[Callable[[], Tensors], str]] = {
    "another family": (
        lambda: {f"unet.{Q}.lora_A.weight": torch.ones(4, 320), f"unet.{Q}.lora_B.weight": torch.ones(320, 4)},
        f"does not fit.*{Q}.*weight of \\[16, 16\\].*down \\[4, 320\\], up \\[320, 4\\]",
    ),
    "a module that is not there": (
        one("unet.down_blocks.5.resnets.0.conv1.lora_A.weight", 2, 16, 3, 3),
        "a module that the teacher of the plan does not have.*down_blocks.5",
    ),
    "a module that is not there, kohya": (
        one("lora_unet_input_blocks_31_1_proj_in.lora_down.weight", 2, 16),
        "does not have.*input_blocks_31",
    ),
    "half a pair": (one(f"unet.{Q}.lora_A.weight", 2, 16), "half of a pair.*down alone"),
    "Flux": (one("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", 2, 16), "no adapter.*Flux"),
    "Flux, kohya": (one("lora_unet_double_blocks_0_img_mlp_0.lora_down.weight", 2, 16), "does not have.*Flux"),
    "SD 3, kohya": (one("lora_unet_joint_blocks_0_x.lora_down.weight", 2, 16), "does not have.*SD 3"),
    "an unknown end": (one(f"unet.{Q}.lora_C.weight", 2, 16), "no adapter.*lora_C"),
    "a ControlNet": (one("controlnet_mid_block.weight", 2, 16), "not a LoRA.*a ControlNet"),
    "a VAE": (one("decoder.conv_in.weight", 2, 16), "not a LoRA.*a VAE"),
    "text encoders alone": (one("text_encoder.a.lora_A.weight", 2, 16), "no part for the U-Net"),
    "one module named twice": (
        lambda: {
            f"{prefix}{Q}.lora_{half}.weight": torch.ones(2, 16) if half == "A" else torch.ones(16, 2)
            for prefix in ("unet.", "")
            for half in "AB"
        } | {f"lora_unet_{Q.replace('.', '_')}.alpha": torch.ones(()), f"lora_unet_{SGM_Q}.alpha": torch.ones(())},
        "two tensors of the LoRA are for the same module",
    ),
    "nothing left": (
        lambda: {
            "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 64, 1, 1),
            "unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.ones(64, 2, 1, 1),
        },
        "nothing of the LoRA is left.*removed by mid",
    ),
}  # fmt: skip
SGM_Q = "input_blocks_1_1_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_is_refused(case: str, students: dict[str, Path], tmp_path: Path) -> None:
    make, message = REFUSED[case]
    save_file(make(), tmp_path / "a.safetensors")
    with pytest.raises(TeacherError, match=f"(?s){message}"):
        transplant(tmp_path / "a.safetensors", students["bk_tiny"], tmp_path / "out.safetensors")
    assert entries(tmp_path) == ["a.safetensors"]


def test_a_pattern_that_cannot_be_renamed(
    teacher: UNet2DConditionModel, students: dict[str, Path], tmp_path: Path
) -> None:
    config = {"unet.target_modules": ["to_q"], "unet.alpha_pattern": {"down_blocks.*to_q": 3}}
    file = lora_file(teacher, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(TeacherError, match=r"alpha_pattern picks modules by a pattern"):
        transplant(file, students["bk_tiny"], tmp_path / "out.safetensors")
    assert entries(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("lora", "student", "out", "error", "message"),
    [
        ("nothing", "good", "out", TeacherError, "no such LoRA"),
        (".", "good", "out", TeacherError, "no LoRA in this folder"),
        ("a.safetensors", ".", "out", VerificationError, "no readable plan.json"),
        ("a.safetensors", "good", "a.safetensors", OutputError, "the output is the input"),
        ("a.safetensors", "good", "no/out", OutputError, "does not exist"),
        ("text", "good", "out.safetensors", TeacherError, "too short"),
        ("a.safetensors", "good", "out.bin", UsageError, "not a safetensors file"),
    ],
    ids=["no file", "no LoRA inside", "no plan", "onto itself", "no folder", "no safetensors", "another suffix"],
)
def test_wrong_arguments(
    lora: str, student: str, out: str, error: type[SurgeryError], message: str, teacher: UNet2DConditionModel,
    students: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    lora_file(teacher, tmp_path / "a.safetensors")
    (tmp_path / "text").write_text("no")
    before = entries(tmp_path)
    folder = students["bk_tiny"] if student == "good" else tmp_path / student
    with pytest.raises(error, match=message):
        transplant(tmp_path / lora, folder, tmp_path / out, force=out == "a.safetensors")
    assert entries(tmp_path) == before


def test_a_plan_that_lies(teacher: UNet2DConditionModel, students: dict[str, Path], tmp_path: Path) -> None:
    data = json.loads((students["bk_tiny"] / "plan.json").read_text())
    data["weights"]["conv_in.weight"] = "conv_out.weight"
    (tmp_path / "plan.json").write_text(json.dumps(data))
    file = lora_file(teacher, tmp_path / "a.safetensors")
    with pytest.raises(VerificationError, match="does not follow from what it removes"):
        transplant(file, tmp_path / "plan.json", tmp_path / "out.safetensors")


def test_the_recipes_name_is_only_a_claim(
    teacher: UNet2DConditionModel, students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = json.loads((students["bk_tiny"] / "plan.json").read_text())
    data["recipe"]["name"] = "../../elsewhere"
    (tmp_path / "plan.json").write_text(json.dumps(data))
    monkeypatch.chdir(tmp_path)
    result: TransplantResult = transplant(lora_file(teacher, tmp_path / "a.safetensors"), tmp_path / "plan.json")
    assert str(result.file) == "a-student.safetensors"
