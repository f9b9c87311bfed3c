"""Train the toy world's VAE and text encoder: all of its pipeline but the U-Net.

    python examples/toy_world/train_parts.py OUT --device cuda --vae-minutes 3 --decoder-minutes 1 --text-minutes 0.3

The VAE learns to give pictures back; then its encoder is frozen and its decoder goes on. The gate: what comes back is
at least 30 dB close and the checker still reads 99 % of it right. The text encoder learns to tell, at every token, all
that the caption has said so far; its heads are thrown away. ``OUT`` gets ``vae``, ``text_encoder``, ``tokenizer``,
``scheduler``, ``gate.json`` and ``round_trip.png``. The exit code is 1 where the gate is not passed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from unet_surgery.data.toy import ToyPictures, scenes_of
from unet_surgery.toyworld import grammar
from unet_surgery.toyworld.checker import judge

PIPELINE = Path(__file__).resolve().parent / "pipeline"
MIN_PSNR_DB = 30.0
MIN_RIGHT = 0.99
MIN_TEXT_ACCURACY = 0.999
CHUNK = 2048
POLL_STEPS = 25
WARMUP_STEPS = 100
REPORT_SECONDS = 20.0
TEST_SEED = 1_000_000

CLASSES = {
    "size": grammar.SIZES,
    "colour": grammar.COLOURS,
    "shape": grammar.SHAPES,
    "size2": grammar.SIZES,
    "colour2": grammar.COLOURS,
    "shape2": grammar.SHAPES,
    "place": (*grammar.POSITIONS, *grammar.RELATIONS),
    "background": grammar.BACKGROUNDS,
}
UNSAID = -100  # what cross_entropy leaves out


def main() -> int:
    options = parse_options()
    started = time.monotonic()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(PIPELINE / name, options.out / name, dirs_exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(str(PIPELINE / "tokenizer"))

    encoder = CLIPTextModel(CLIPTextConfig(**json.loads((PIPELINE / "text_encoder" / "config.json").read_text())))
    text = train_text(encoder.to(options.device), tokenizer, options)
    save_text_encoder(encoder, options.out / "text_encoder", tokenizer)

    train, test = pools(tokenizer, options)
    vae = first_vae(options.start).to(options.device)
    steps = train_vae(vae, train, test, options, minutes=options.vae_minutes, whole=True)
    center_and_balance(vae, train[:CHUNK])
    steps_decoder = train_vae(vae, train, test, options, minutes=options.decoder_minutes, whole=False)
    std = latents_std(vae, train[: 2 * CHUNK])
    vae.register_to_config(scaling_factor=round(1 / std, 5))
    gate = vae_gate(vae, test, len(test))
    vae.save_pretrained(str(options.out / "vae"))
    back = AutoencoderKL.from_pretrained(str(options.out / "vae")).to(options.device)
    write_round_trip(back, test, options.out / "round_trip.png")

    passed = (
        gate["psnr_db"] >= MIN_PSNR_DB
        and min(gate["right_one"], gate["right_two"]) >= MIN_RIGHT
        and text["held_out_accuracy"] >= MIN_TEXT_ACCURACY
    )
    report = {
        "passed": passed,
        "vae": gate | {"steps": steps, "decoder_steps": steps_decoder, "latents_std": std},
        "text_encoder": text,
        "seconds": round(time.monotonic() - started, 1),
        "seed": options.seed,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    (options.out / "gate.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2), flush=True)
    return 0 if passed else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--vae-minutes", type=float, default=20.0)
    parser.add_argument("--decoder-minutes", type=float, default=5.0)
    parser.add_argument("--text-minutes", type=float, default=1.0)
    parser.add_argument("--batch", type=int, help="pictures a step (128 on a GPU, 16 on a CPU)")
    parser.add_argument("--pictures", type=int, help="training pictures (65536 on a GPU, 16384 on a CPU)")
    parser.add_argument("--test-pictures", type=int, default=2000, help="half of one thing, half of two")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="of the VAE; the decoder alone gets a third")
    parser.add_argument("--kl", type=float, default=1e-6, help="weight of the KL term, summed over a picture's latents")
    parser.add_argument("--start", type=Path, help="go on with the VAE of this folder, that an earlier run wrote")
    parser.add_argument(
        "--latent-noise", type=float, default=0.05, help="in stds, what the decoder alone learns to bear"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-graph", action="store_true", help="do not capture the steps as CUDA graphs")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    options.batch = options.batch or (128 if gpu else 16)
    options.pictures = options.pictures or (65_536 if gpu else 16_384)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


# -- steps against the clock -------------------------------------------------------------------------------------------


class Steps:
    """Optimizer steps of one loss: eager, or captured once as a CUDA graph and replayed."""

    def __init__(
        self, loss: Callable[[], Tensor], parameters: list[torch.nn.Parameter], lr: float, graph: bool
    ) -> None:
        device = parameters[0].device
        self.peak = lr
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=torch.tensor(lr, device=device) if graph else lr,
            betas=(0.9, 0.99),
            weight_decay=1e-3,
            capturable=graph,
        )
        self.loss = loss
        self.value = torch.zeros((), device=device)
        self.graph = self._capture() if graph else None

    def step(self) -> None:
        if self.graph is None:
            self._body()
        else:
            self.graph.replay()

    def set_lr(self, lr: float) -> None:
        group = self.optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)  # in place: the captured step reads it there
        else:
            group["lr"] = lr

    def _body(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.value.copy_(loss.detach())

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Record a step after three eager ones on a side stream, as torch's notes on CUDA graphs prescribe."""
        self.set_lr(self.peak / WARMUP_STEPS)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._body()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._body()
        return graph


def run(steps: Steps, minutes: float, say: Callable[[int, float], None]) -> int:
    """Step until the time is over, the learning rate falling to zero with it; return the number of steps."""
    started = reported = time.monotonic()
    for number in step_numbers(started, minutes):
        share = min(1.0, (time.monotonic() - started) / (60 * minutes))
        steps.set_lr(steps.peak * min(1.0, (number + 1) / WARMUP_STEPS) * max(1 - share, 0.002))
        steps.step()
        if number % POLL_STEPS == POLL_STEPS - 1:
            value = steps.value.item()  # waits for the GPU, so that the clock is true
            if not np.isfinite(value):
                raise SystemExit(f"the loss is {value} at step {number}")
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                say(number + 1, value)
    say(number + 1, steps.value.item())
    return number + 1


def step_numbers(started: float, minutes: float) -> Iterator[int]:
    number = 0
    while number == 0 or time.monotonic() - started < 60 * minutes:
        yield number
        number += 1


# -- the VAE -----------------------------------------------------------------------------------------------------------


def pools(tokenizer: Any, options: argparse.Namespace) -> tuple[Tensor, list[tuple[str, np.ndarray[Any, Any]]]]:
    """Return training pictures, uint8 [n, 3, 32, 32] on the device, and test pictures with captions, one and two apart.

    Training sees no held-out scene; the test draws from all.
    """
    started = time.monotonic()
    train = ToyPictures(tokenizer, options.pictures, options.seed)

    def chunk(first: int) -> Tensor:
        return quantised(train.batch(range(first, min(first + CHUNK, len(train))))[0])

    with ThreadPoolExecutor() as threads:
        pictures = torch.cat(list(threads.map(chunk, range(0, len(train), CHUNK)))).to(options.device)
    half = options.test_pictures // 2
    test: list[tuple[str, np.ndarray[Any, Any]]] = []
    for objects in ("one", "two"):
        fresh = ToyPictures(tokenizer, half, TEST_SEED, objects=objects, split="all")
        shown = quantised(fresh.batch(range(half))[0]).permute(0, 2, 3, 1).contiguous().numpy()
        test += zip(fresh.captions(range(half)), shown, strict=True)
    print(f"{len(pictures)} training and {len(test)} test pictures in {time.monotonic() - started:.1f} s", flush=True)
    return pictures, test


def train_vae(
    vae: Any, train: Tensor, test: list[Any], options: argparse.Namespace, *, minutes: float, whole: bool
) -> int:
    """Train the whole VAE, or with its encoder frozen the decoder alone; return the number of steps."""
    if minutes <= 0:
        return 0
    vae.encoder.requires_grad_(whole)
    vae.quant_conv.requires_grad_(whole)
    noise = 0.0 if whole else options.latent_noise * latents_std(vae, train[:CHUNK])
    vae.train()

    def loss() -> Tensor:
        pictures = scaled(train[torch.randint(len(train), (options.batch,), device=train.device)])
        with torch.set_grad_enabled(whole):
            mean, logvar = moments(vae, pictures)
        latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        if noise:
            latents = latents + noise * torch.randn_like(mean)
        again = decoded(vae, latents)
        error = again - pictures
        total = 4 * error.square().mean() + 0.25 * error.abs().mean()
        if whole:
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
            total = total + options.kl * kl
        return total

    def say(step: int, value: float) -> None:
        shown = test[:: max(1, len(test) // 400)]
        found = vae_gate(vae, shown, len(shown))
        vae.train()
        print(
            f"{'vae' if whole else 'decoder'} step {step} loss {value:.4f} psnr {found['psnr_db']:.2f} dB "
            f"right {found['right_one']:.3f} one {found['right_two']:.3f} two",
            flush=True,
        )

    parameters = [p for p in vae.parameters() if p.requires_grad]
    graph = options.device == "cuda" and not options.no_graph
    return run(Steps(loss, parameters, options.lr * (1 if whole else 1 / 3), graph), minutes, say)


def first_vae(start: Path | None) -> Any:
    """Return the VAE to begin with; a new one says its latents with little noise.

    Its log variance begins at -8: at 0, where the initialisation leaves it, what the decoder sees is noise for the
    first thousand steps (17.3 dB after 200 steps, and 20.5 dB so).
    """
    if start is not None:
        return AutoencoderKL.from_pretrained(str(start))
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(str(PIPELINE / "vae")))
    with torch.no_grad():
        half = vae.config.latent_channels
        vae.quant_conv.weight[half:] *= 0.1
        vae.quant_conv.bias[half:] = -8.0
    return vae


def moments(vae: Any, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log variance of the posterior, each [n, 4, 8, 8], clamped as diffusers does."""
    mean, logvar = vae.quant_conv(vae.encoder(pictures)).chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)


def decoded(vae: Any, latents: Tensor) -> Tensor:
    pictures: Tensor = vae.decoder(vae.post_quant_conv(latents))
    return pictures


def center_and_balance(vae: Any, pictures: Tensor) -> None:
    """Give every latent channel mean 0 and one std, by the 1 × 1 convolutions around the latents: exactly undone there.

    For posterior mean μ and log variance: μ' = (μ − m)·f, logvar' = logvar + 2 ln f; and W'z' + b' = W(z'/f + m) + b.
    """
    with torch.no_grad():
        latents = sampled(vae, pictures)
        middle, stds = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        factor = stds.square().mean().sqrt() / stds
        channels = len(middle)
        before, after = vae.quant_conv, vae.post_quant_conv
        before.weight[:channels] *= factor[:, None, None, None]
        before.bias[:channels] = (before.bias[:channels] - middle) * factor
        before.bias[channels:] += 2 * factor.log()
        after.bias += after.weight[:, :, 0, 0] @ middle
        after.weight /= factor[None, :, None, None]


def sampled(vae: Any, pictures: Tensor) -> Tensor:
    with torch.no_grad():
        parts = []
        for part in pictures.split(CHUNK // 4):
            mean, logvar = moments(vae, scaled(part))
            parts.append(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
        return torch.cat(parts)


def latents_std(vae: Any, pictures: Tensor) -> float:
    return float(sampled(vae, pictures).std())


def round_trip(vae: Any, shown: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return uint8 [n, H, W, 3] pictures after encoding, drawing from the posterior and decoding."""
    with torch.no_grad():
        device = next(vae.parameters()).device
        parts = []
        for part in torch.from_numpy(shown).permute(0, 3, 1, 2).contiguous().split(CHUNK // 4):
            latents = sampled(vae, part.to(device))
            parts.append(quantised(decoded(vae, latents).clamp(-1, 1)).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)


def vae_gate(vae: Any, test: list[tuple[str, np.ndarray[Any, Any]]], count: int) -> dict[str, float]:
    """Return PSNR, of the mean squared error of all pictures, and the shares that the checker still reads right."""
    vae.eval()
    shown = np.stack([picture for _, picture in test])
    again = round_trip(vae, shown)
    error = ((shown.astype(np.float64) - again) ** 2).mean()
    right = np.array([judge(picture, said).right for (said, _), picture in zip(test, again, strict=True)])
    return {
        "psnr_db": round(float(10 * np.log10(255**2 / max(error, 1e-9))), 3),
        "right_one": float(right[: count // 2].mean()),
        "right_two": float(right[count // 2 :].mean()),
        "pictures": count,
    }


def quantised(pictures: Tensor) -> Tensor:
    """Return −1…1 as uint8."""
    return ((pictures + 1) * 127.5).round().to(torch.uint8)


def scaled(pictures: Tensor) -> Tensor:
    """Return uint8 as −1…1."""
    return pictures.float() / 127.5 - 1


# -- the text encoder --------------------------------------------------------------------------------------------------


def train_text(encoder: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, float]:
    """Train the encoder to know at every token all that was said up to it; return its accuracy on held-out captions."""
    started = time.monotonic()
    ids, labels = captions_with_labels(tokenizer, "train", options.device)
    test_ids, test_labels = captions_with_labels(tokenizer, "held_out", options.device)
    sizes = [len(words) for words in CLASSES.values()]
    heads = torch.nn.Linear(encoder.config.hidden_size, sum(sizes)).to(options.device)
    # Half of a batch is of one thing: there are 24 times as many captions of two.
    num_one = len(scenes_of("one", "train"))
    encoder.train()

    def loss() -> Tensor:
        half = (options.batch // 2,)
        one = torch.randint(num_one, half, device=ids.device)
        two = torch.randint(num_one, len(ids), half, device=ids.device)
        rows = torch.cat([one, two])
        logits = heads(encoder(ids[rows]).last_hidden_state).split(sizes, dim=-1)
        terms = [
            F.cross_entropy(part.flatten(0, 1), labels[rows, :, k].flatten(), ignore_index=UNSAID)
            for k, part in enumerate(logits)
        ]
        return torch.stack(terms).mean()

    def accuracy() -> float:
        with torch.no_grad():
            encoder.eval()
            logits = heads(encoder(test_ids).last_hidden_state).split(sizes, dim=-1)
            right = torch.stack([part.argmax(-1) for part in logits], dim=-1) == test_labels
            said = test_labels != UNSAID
            encoder.train()
            return float(right[said].float().mean())

    def say(step: int, value: float) -> None:
        print(f"text step {step} loss {value:.5f} held-out accuracy {accuracy():.5f}", flush=True)

    # Eager: transformers' mask building looks at the values of tensors, which no graph can.
    num_steps = run(Steps(loss, [*encoder.parameters(), *heads.parameters()], 2e-3, False), options.text_minutes, say)
    encoder.eval()
    return {
        "held_out_accuracy": accuracy(),
        "steps": num_steps,
        "seconds": round(time.monotonic() - started, 1),
    }


def captions_with_labels(tokenizer: Any, split: Any, device: str) -> tuple[Tensor, Tensor]:
    """Return all captions' ids, [n, T], and labels, [n, T, attributes]: ``UNSAID`` before an attribute's word."""
    scenes = [*scenes_of("one", split), *scenes_of("two", split)]
    texts = [grammar.caption(scene) for scene in scenes]
    length = tokenizer.model_max_length
    ids = torch.tensor(tokenizer(texts, padding="max_length", max_length=length).input_ids)
    labels = np.full((len(scenes), length, len(CLASSES)), UNSAID)
    for row, (scene, text) in enumerate(zip(scenes, texts, strict=True)):
        num_words = len(text.split())
        said = {
            "place": (6 if len(scene.things) == 1 else 4, scene.place),
            "background": (num_words - 2, scene.background),
        }
        for end, first, thing in zip(("", "2"), (1, num_words - 7), scene.things, strict=False):
            said |= {f"size{end}": (first, thing.size), f"colour{end}": (first + 1, thing.colour)}
            said |= {f"shape{end}": (first + 2, thing.shape)}
        for column, (name, choices) in enumerate(CLASSES.items()):
            if name in said:
                word, value = said[name]
                labels[row, word + 1 :, column] = choices.index(value)  # the start token is the first
    return ids.to(device), torch.from_numpy(labels).to(device)


def save_text_encoder(encoder: Any, folder: Path, tokenizer: Any) -> None:
    """Write the encoder under the names that every version of transformers reads, and read it back."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(PIPELINE / "text_encoder" / "config.json", folder / "config.json")
    tensors = {
        name if name.startswith("text_model.") else f"text_model.{name}": tensor.detach().float().cpu().contiguous()
        for name, tensor in encoder.state_dict().items()
        if not name.endswith("position_ids")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    back, info = CLIPTextModel.from_pretrained(str(folder), output_loading_info=True)
    faults = {kind: names for kind, names in info.items() if names}
    ids = torch.tensor([tokenizer("a small red circle", padding="max_length").input_ids])
    with torch.no_grad():
        ours = encoder(ids.to(next(encoder.parameters()).device)).last_hidden_state.cpu()
        theirs = back.eval()(ids).last_hidden_state
    if faults or not torch.allclose(ours, theirs, atol=2e-2):  # TF32 on a GPU
        raise SystemExit(f"the text encoder does not come back as it was written: {faults}")


# -- a picture of it ---------------------------------------------------------------------------------------------------


def write_round_trip(vae: Any, test: list[tuple[str, np.ndarray[Any, Any]]], path: Path) -> None:
    """Write a PNG at four times the size: rows of pictures, and below each what comes back."""
    picked = [test[i * (len(test) - 1) // 31][1] for i in range(32)]
    shown = np.stack(picked)
    again = round_trip(vae.eval(), shown)
    rows = [np.concatenate(list(some[k : k + 8]), axis=1) for k in range(0, 32, 8) for some in (shown, again)]
    grid = np.concatenate(rows).repeat(4, axis=0).repeat(4, axis=1)
    height, width = grid.shape[:2]
    raw = b"".join(b"\0" + line.tobytes() for line in grid)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    )
    chunks = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


if __name__ == "__main__":
    sys.exit(main())
