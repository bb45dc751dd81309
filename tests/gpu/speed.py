"""How fast: the loss against the three matrix products and a public kernel, steps against open_clip's, the loader."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.benchmarks.optimizers import ROWS, Row, cost
from tests.gpu import emulated
from tests.gpu.checks import Check, Measured, Skip, on_gpu, peak_bytes, seconds
from tests.gpu.memory import batch_for
from trainer.core import distributed
from trainer.core.types import Embeddings
from trainer.engine import EngineSettings, build_engine
from trainer.losses import SigmoidLoss
from trainer.models import DualEncoder, ModelSettings, build
from trainer.optim import AdamWSettings, build_optimizer
from trainer.plan.model_shapes import KNOWN, stand_in
from trainer.step import train_step

WIDTH = 768


def embeddings(rows: int, dtype: torch.dtype) -> Embeddings:
    device = distributed.device()
    generator = torch.Generator(device).manual_seed(0)
    image, text = (
        normalize(torch.randn(rows, WIDTH, device=device, generator=generator), dim=1).to(dtype) for _ in range(2)
    )
    scalars = [torch.full((1,), value, device=device, requires_grad=True) for value in (10.0, -10.0)]
    return Embeddings(image.requires_grad_(), text.requires_grad_(), *scalars)


def forward_backward(loss: Callable[[Embeddings], Tensor], z: Embeddings) -> None:
    for leaf in z[:4]:
        leaf.grad = None
    loss(z).backward()


def products(rows: int, dtype: torch.dtype, chunk: int = 8192) -> Callable[[], None]:
    """The three products that any exact loss makes, in tiles and without their sums: the floor."""
    z, chunk = embeddings(rows, dtype), min(chunk, rows)
    image, text = z.image.detach(), z.text.detach()
    logits = torch.empty(chunk, chunk, dtype=dtype, device=image.device)
    gradient = torch.empty_like(image[:chunk])

    def run() -> None:
        for x in image.split(chunk):
            for u in text.split(chunk):
                torch.mm(x, u.t(), out=logits)
                torch.mm(logits, u, out=gradient)
                torch.mm(logits.t(), x, out=gradient)

    return run


def loss_time(rows: int, dtype: torch.dtype, **keys: Any) -> Measured:
    """Forward and backward of this rank's whole batch, and its memory beyond the inputs."""
    z, loss = embeddings(rows, dtype), SigmoidLoss(**keys)
    forward_backward(loss, z)
    mine = seconds(lambda: forward_backward(loss, z), rounds=3, warmups=1)
    operands = torch.float16 if loss.precision == "fast" and on_gpu() else dtype
    floor = seconds(products(rows, operands), rounds=3, warmups=1)
    for leaf in z[:4]:
        leaf.grad = None
    peak = peak_bytes(lambda: forward_backward(loss, z)) / 2**20 if on_gpu() else float("nan")
    rate = 6 * rows * rows * WIDTH / mine / 1e12
    text = f"{1e3 * mine:.1f} ms ({rate:.0f} TFLOP/s), {mine / floor:.2f}x the three products, {peak:.0f} MiB"
    return Measured(text, None, {"seconds": mine, "floor": floor, "peak_mib": peak})


def public_kernel(rows: int, dtype: torch.dtype, **keys: Any) -> Measured:
    """Against siglip-kernel (PyPI), in the same call."""
    if importlib.util.find_spec("siglip_kernel") is None:
        raise Skip("pip install siglip-kernel")
    if not on_gpu():
        raise Skip("siglip-kernel needs a GPU")
    import siglip_kernel

    z, loss = embeddings(rows, dtype), SigmoidLoss(**keys)
    image, text = (value.detach().requires_grad_() for value in z[:2])
    log_temperature, bias = (
        torch.tensor(value, device=image.device, requires_grad=True) for value in (2.302585, -10.0)
    )

    def peer_step() -> None:
        for leaf in (image, text, log_temperature, bias):
            leaf.grad = None
        siglip_kernel.fused_siglip_loss(image, text, log_temperature, bias).backward()

    mine = seconds(lambda: forward_backward(loss, z), rounds=3, warmups=1)
    peer = seconds(peer_step, rounds=3, warmups=2)
    return Measured(f"{1e3 * mine:.1f} ms against {1e3 * peer:.1f} ms, {mine / peer:.2f}x", mine <= peer)


def share_of_a_step(rows: int, precision: str) -> Measured:
    """The loss of one of eight emulated ranks, beside the towers' step on as many pairs where that was measured."""
    distributed.init(60)
    z = embeddings(rows, torch.bfloat16 if on_gpu() else torch.float32)
    with emulated.ranks(8):
        loss = SigmoidLoss(precision=precision)  # type: ignore[arg-type]
        took = seconds(lambda: forward_backward(loss, z), rounds=3, warmups=1)
    return Measured(f"{1e3 * took:.1f} ms for {rows} pairs a rank x 8", None, {"seconds": took})


def vit_base(dry: bool, compile: bool, ds_config: str = "zero0") -> tuple[Any, DualEncoder]:
    """An engine on SigLIP ViT-B/16 (toy towers when dry), and its model."""
    distributed.init(60)
    if dry:
        from tests.support.tiny_models import tiny_settings

        model = build(tiny_settings("siglip"))
    else:
        name = "google/siglip-base-patch16-224"
        with stand_in(ModelSettings(path=name), KNOWN[name]) as known:
            model = build(ModelSettings(config=KNOWN[name], tokenizer=known.path))
    settings = EngineSettings(ds_config=ds_config, precision="bf16" if on_gpu() else "fp32", compile=compile)
    return build_engine(model, build_optimizer(model, AdamWSettings()), settings, clip=1.0), model


@cache
def our_rates(dry: bool, compile: bool, ds_config: str = "zero0") -> tuple[float, float]:
    """Pairs a second of our steps, in one pass and in two."""
    rows, micro_batch = (16, 4) if dry else (1024, 256)
    engine, model = vit_base(dry, compile, ds_config)
    batch, part, loss = batch_for(model, rows), batch_for(model, micro_batch), SigmoidLoss()
    single = micro_batch / seconds(lambda: train_step(engine, part, loss, None), rounds=5)
    return single, rows / seconds(lambda: train_step(engine, batch, loss, micro_batch), rounds=3, warmups=1)


def towers(dry: bool) -> Measured:
    """Ours, and plain torch on the same modules (no engine, no caching)."""
    single, double = our_rates(dry, False)
    micro_batch = 4 if dry else 256
    _, model = vit_base(dry, False)
    loss, one = SigmoidLoss(), batch_for(model, micro_batch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=on_gpu())
    local = one.to(distributed.device())

    def plain() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model(local.pixels, local.tokens, local.token_mask)).backward()
        optimizer.step()

    floor = micro_batch / seconds(plain, rounds=5)
    text = (
        f"{single:.0f} pairs/s in one pass ({single / floor:.2f}x plain torch), "
        f"{double:.0f} in two ({double / floor:.2f}x)"
    )
    facts = {"one_pass": single, "two_passes": double, "plain": floor}
    return Measured(text, None if dry else single / floor >= 0.95 and double / floor >= 0.7, facts)


def partitioned(dry: bool) -> Measured:
    """ZeRO-1 on one card, where there is nothing to partition: what its bookkeeping costs."""
    zero0, zero1 = our_rates(dry, False), our_rates(dry, False, "zero1")
    text = (
        f"{zero1[0]:.0f} pairs/s in one pass ({zero1[0] / zero0[0]:.2f}x of ZeRO-0), "
        f"{zero1[1]:.0f} in two ({zero1[1] / zero0[1]:.2f}x)"
    )
    return Measured(text, None, {"one_pass": zero1[0], "two_passes": zero1[1]})


def compiled_towers(dry: bool) -> Measured:
    """engine.compile against the layers as they are."""
    if dry:
        raise Skip("tests/test_engine_compiled.py compiles on the CPU")
    eager, mine = our_rates(dry, False), our_rates(dry, True)
    text = (
        f"{mine[0]:.0f} pairs/s in one pass ({mine[0] / eager[0]:.2f}x), "
        f"{mine[1]:.0f} in two ({mine[1] / eager[1]:.2f}x)"
    )
    return Measured(text, mine[0] > eager[0] and mine[1] > eager[1], {"one_pass": mine[0], "two_passes": mine[1]})


def open_clip_towers(dry: bool) -> tuple[Any, Any]:
    """open_clip and its ViT-B/16 for the sigmoid loss, of the same shape as ours."""
    if importlib.util.find_spec("open_clip") is None:
        raise Skip("pip install open_clip_torch")
    try:
        import open_clip
    except ImportError:  # torchvision is not there, or does not fit this torch
        from tests.support.open_clip_models import import_open_clip

        open_clip = import_open_clip()
    if not dry:
        return open_clip, open_clip.create_model("ViT-B-16-SigLIP", pretrained=None, output_dict=True)
    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 2, "layers": 2}
    return open_clip, open_clip.CLIP(32, vision, text, init_logit_bias=-10.0, output_dict=True)


def open_clip_rate(dry: bool, accum_freq: int, compile: bool) -> float:
    """Pairs a second of open_clip's own training loop, in micro-batches as ours."""
    distributed.init(60)
    open_clip, model = open_clip_towers(dry)
    from open_clip_train.train import train_one_epoch

    model.to(distributed.device())
    optimizer = torch.optim.AdamW(model.parameters(), fused=on_gpu())
    if compile:
        model = torch.compile(model)
    micro_batch, side, tokens = (4, 16, 8) if dry else (256, 224, 64)
    batch = torch.randn(micro_batch, 3, side, side), torch.randint(2, 20, (micro_batch, tokens))
    batch = tuple(part.pin_memory() for part in batch) if on_gpu() else batch
    args = Namespace(device=distributed.device().type, precision="amp_bf16" if on_gpu() else "fp32", distill=False)
    args.accum_freq, args.batch_size, args.rank, args.world_size = accum_freq, micro_batch, 0, 1
    args.skip_scheduler, args.horovod, args.grad_clip_norm, args.wandb = True, False, 1.0, False
    args.log_every_n_steps = 1000
    loss = open_clip.loss.SigLipLoss(rank=0, world_size=1)
    data = {"train": SimpleNamespace(dataloader=Batches([batch] * accum_freq), set_epoch=lambda epoch: None)}
    epoch = partial(train_one_epoch, model, data, loss, 0, optimizer, None, None, None, args)
    return accum_freq * micro_batch / seconds(epoch, rounds=5)


def against_open_clip(dry: bool, compile: bool) -> Measured:
    """One pass, and two where open_clip has --accum-freq, which it cannot compile."""
    if dry and compile:
        raise Skip("nothing to be learned of toy towers")
    single, double = our_rates(dry, compile)
    one = open_clip_rate(dry, 1, compile)
    facts = {"one_pass": single, "two_passes": double, "open_clip": one}
    text = f"{single:.0f} against {one:.0f} pairs/s in one pass ({single / one:.2f}x)"
    if compile:
        return Measured(f"{text}; {double:.0f} in two ({double / one:.2f}x of one pass)", single >= one, facts)
    several = open_clip_rate(dry, 4, False)
    text = f"{text}, {double:.0f} against {several:.0f} in several ({double / several:.2f}x)"
    facts["open_clip_accumulated"] = several
    return Measured(text, None if dry else single >= one and double >= several, facts)


class Batches(list[Any]):
    """What open_clip's loop takes for a loader."""

    @property
    def num_batches(self) -> int:
        return len(self)

    @property
    def num_samples(self) -> int:
        return sum(len(images) for images, _ in self)


def loader(rows: int, batches: int) -> Measured:
    """Pairs a second from tars to the device's memory."""
    from tests.support.runs import make_shards
    from tests.support.tiny_models import tiny_captions, tiny_settings
    from trainer.data import DataSettings, build_loader

    distributed.init(60)
    model = build(tiny_settings("siglip"))
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder), tiny_captions(256))
        stream = build_loader(DataSettings(train=str(shards), cache_decoded=0), model.preprocess, rows, 0, 1, 0, 0)
        try:
            next(stream)
            start = time.perf_counter()
            for _ in range(batches):
                batch = next(stream).to(distributed.device())
            if on_gpu():
                torch.cuda.synchronize()
            rate = batches * rows / (time.perf_counter() - start)
        finally:
            stream.close()
    return Measured(f"{rate:.0f} tiny pairs/s on {batch.pixels.device}", batch.pixels.device == distributed.device())


def update(row: Row, layers: int) -> Measured:
    """An optimizer's step alone."""
    held, nanoseconds = cost(row.settings, layers, distributed.device())
    return Measured(f"{nanoseconds:.2f} ns and {held:.2f} bytes a parameter", None, {"ns": nanoseconds, "bytes": held})


def checks(dry: bool) -> list[Check]:
    rows = 256 if dry else 65536
    half = torch.float32 if dry else torch.bfloat16
    return [
        Check(f"sigmoid, {rows // 4} pairs, fp32", "", partial(loss_time, rows // 4, torch.float32)),
        Check(f"sigmoid, {rows} pairs, bf16 embeddings", "", partial(loss_time, rows, half)),
        Check(f"sigmoid, {rows} pairs, fast", "", partial(loss_time, rows, half, precision="fast")),
        Check("fast against siglip-kernel", "not slower", partial(public_kernel, rows, half, precision="fast")),
        *(
            Check(
                f"loss of 8 emulated ranks, {precision}", "", partial(share_of_a_step, 32 if dry else 4096, precision)
            )
            for precision in ("exact", "fast")
        ),
        Check("ViT-B/16 steps", "one pass >= 0.95x, two >= 0.7x of plain torch", partial(towers, dry)),
        Check("ViT-B/16 steps against open_clip's", "not slower", partial(against_open_clip, dry, False)),
        Check("ViT-B/16 steps, ZeRO-1", "", partial(partitioned, dry)),
        Check("ViT-B/16 steps, engine.compile", "faster than without", partial(compiled_towers, dry)),
        Check("compiled, against open_clip's compiled", "not slower", partial(against_open_clip, dry, True)),
        Check("loader into the device", "arrives", partial(loader, 32, 4 if dry else 50)),
        *(Check(f"update, {row.name}", "", partial(update, row, 1 if dry else 6)) for row in ROWS),
    ]
