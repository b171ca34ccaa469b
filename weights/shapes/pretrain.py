"""Pretrains the base models of the shapes world.

They are to it what the official Qwen2.5-VL and Wan2.1 are to the full-size InstructX.

    python weights/shapes/pretrain.py tokenizer vae decoder vision mllm dit --out runs/base

Each name is one part. Parts are made in the order given; each needs some of those above it. A part
that is cut off goes on where it was. One that is finished is written again as it was, over what
came later (decoder after refine would be wrong). To train one anew, delete its state first
(vae.state.pt ...), and for dit after a new VAE latents.pt too.
    tokenizer  byte-level BPE over the sentences of the world, with Qwen's special tokens
    vae        the tiny WanVAE on images and clips: L1 + KL
    decoder    the VAE's decoder on its own, encoder and latents fixed; at any time, as nothing
               else changes
    refine     all of the VAE again: latents change, and what was trained on the old ones has to go
               on with the new
    vision     the vision tower of the MLLM learns to name what is in each cell: read from captions
               alone, colors and shapes stay at chance for thousands of steps
    mllm       the tiny Qwen2.5-VL learns to see and to speak: captions, questions, and what a
               picture would show once an instruction were carried out, each a text to write. No
               pixel is edited here: editing is what train.py teaches
    instruct   the MLLM again, on what edits lead to, half of them of two parts
    dit        the tiny WanDiT learns to paint from captions: flow matching, in the place of Wan's
               text-to-video training
    ship       after train.py: the files beside this script, from --out and --trained

Wan reads captions through T5. Here a frozen table of random word vectors stands in for it. It
carries words and no understanding, so whatever meaning an edit needs has to come out of the MLLM,
through queries and connector.
"""

import argparse
import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import world

from connector import SYSTEM_PROMPT, InstructX
from dit import WanDiT, WanDiTConfig
from edit import whole
from mllm import Processor, Qwen2_5_VL, Qwen2_5_VLConfig, VisionConfig
from sampler import FlowSampler
from train import Metrics
from vae import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    ResidualBlock,
    Upsample,
    VAEConfig,
    WanVAE,
)

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VAE = dict(  # 4x in space, 2x in time
    dim=16,
    z_dim=16,
    dim_mult=(1, 2, 4),
    num_res_blocks=1,
    temporal_downsample=(False, True),
)
DIT = dict(dim=192, ffn_dim=768, num_heads=4, num_layers=6, text_dim=192)
LOST = ("sketch", "mosaic", "gray", "negative", "fog")  # looks that suffer most in the VAE
TEXT_LENGTH = 48  # captions are padded to this many tokens, with zeros, as Wan's are to 512
IMAGES, CLIPS = 12000, 3000  # pictures rendered once and drawn from
# The kinds that `instruct` draws from: what takes longest to learn most often.
TAUGHT = ("hybrid",) * 12 + ("swap",) * 3 + ("add", "color", "remove", "ref_swap") * 2
TAUGHT += ("ref_add", "style", "tone")


def bank(out, seed=10**6):
    """Rendered cases of the split "train", sources and targets.

    Returns ({"image": uint8 (N, 1, H, W, 3), "clip": (N, T, H, W, 3)}, {"image": [caption], ...}).
    """
    file = out / "bank.pt"
    if not file.exists():
        pictures, captions = {}, {}
        for name, count, video in (("image", IMAGES // 2, False), ("clip", CLIPS // 2, True)):
            frames, captions[name] = [], []
            for i in tqdm(range(count), desc=f"render {name}s", disable=None):
                case = world.sample(seed + i, video=video)
                frames += [case.source, case.target]
                scenes = case.source_scene, case.target_scene
                captions[name] += [world.caption(scene) for scene in scenes]
            pictures[name] = torch.from_numpy(np.stack(frames))
        save({"pictures": pictures, "captions": captions}, file)
    data = torch.load(file, weights_only=True, mmap=True)
    return data["pictures"], data["captions"]


def save(state, file):
    """torch.save that appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:
        torch.save(state, partial)


def fit(name, out, model, loss_of, steps, lr, matrices=(), muon_lr=0.02, minutes_between_saves=3):
    """AdamW, and Muon for `matrices`, with warm-up and a cosine.

    `loss_of(step, rng)` -> (loss, figures). Everything random comes from the step, so resuming is
    exact.
    """
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    # Views, since to Muon a convolution is a matrix too.
    flat = [torch.nn.Parameter(p.data.flatten(1)) for p in matrices]
    highest = lr, muon_lr
    optimizers = [torch.optim.AdamW(others, lr=highest[0], betas=(0.9, 0.95), weight_decay=0.01)]
    optimizers += [torch.optim.Muon(flat, lr=highest[1], weight_decay=0.01)] if flat else []
    file, first, saved = out / f"{name}.state.pt", 0, time.time()
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(kept)
        first = state["step"]
    log, recent = Metrics(out / f"{name}.jsonl", first + 1), {}
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, disable=None)
    for step in bar:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        rate = min(1, (step + 1) / 100) * (0.02 + 0.98 * cosine)
        for optimizer, peak in zip(optimizers, highest):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
        torch.manual_seed(step)
        loss, figures = loss_of(step, np.random.default_rng([7, step]))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for view, p in zip(flat, matrices):
            view.grad = p.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
        for key, value in {"loss": loss, **figures}.items():
            recent.setdefault(key, []).append(float(value.detach()))
        if step % 20 == 19:
            means = {key: round(sum(values) / len(values), 4) for key, values in recent.items()}
            bar.set_postfix(means)
            log.write({"step": step + 1, "time": round(time.time(), 1), **means})
            recent.clear()
        if step + 1 == steps or time.time() - saved > 60 * minutes_between_saves:
            states = [optimizer.state_dict() for optimizer in optimizers]
            save({"model": model.state_dict(), "optimizers": states, "step": step + 1}, file)
            saved = time.time()


def make_tokenizer(out, args):
    """Byte-level BPE, so that any text can be read.

    Qwen's special tokens come first, so that none can be learnt from text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [SYSTEM_PROMPT, "system\n", "user\n", "assistant\n"] * 50
    texts += world.vocabulary_texts(40000, seed=3)
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    tokenizer.add_special_tokens(special)
    (out / "mllm").mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "mllm" / "tokenizer.json"))
    example = tokenizer.encode("replace the red circle with a blue star").tokens
    print(f"{tokenizer.get_vocab_size()} tokens; {example}")


def to_video(pictures):
    """uint8 (B, T, H, W, 3) -> (B, 3, T, H, W) in [-1, 1]."""
    return pictures.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def draw(pictures, rng, count):
    """`count` of the bank's pictures, mirrored at random.

    For the VAE alone: captions do not hold for mirrored pictures.
    """
    chosen = pictures[torch.from_numpy(rng.integers(len(pictures), size=count))]
    axes = [axis for axis in (2, 3) if rng.random() < 0.5]
    return to_video(chosen.flip(axes) if axes else chosen)


def paint(rng, count, video):
    """`count` new scenes of the split "train", as draw has them.

    Half have a look, four in five of those one of `LOST`.
    """
    frames = []
    while len(frames) < count:
        scene = world.draw_scene(rng, video)
        if any(thing.held_out() for thing in scene.things):
            continue
        looks = (None,)
        if rng.random() >= 0.5:
            looks = LOST if rng.random() < 0.8 else tuple(world.LOOKS)
        scene = replace(scene, look=world.pick(rng, looks))
        frames.append(world.render(scene, frames=9 if video else 1))
    return to_video(torch.from_numpy(np.stack(frames)))


def quick_start(vae):
    """Weights from which a VAE learns in minutes.

    PyTorch's own are a third as large, and every layer shrinks the signal. Here every residual
    branch starts at zero and so does what a convolution makes of the past: at first there are only
    a few linear layers between picture and picture. Of two frames their mean is kept, and shown
    twice: right where nothing moves.
    """
    for module in vae.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            is_causal = isinstance(module, CausalConv3d) and module.past == 2
            past = is_causal and module.kernel_size[1] == 3
            inputs = module.weight[0].numel() / (3 if past else 1)
            torch.nn.init.normal_(module.weight, std=inputs**-0.5)
            torch.nn.init.zeros_(module.bias)
            if past:
                module.weight.data[:, :, :2] = 0
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            torch.nn.init.zeros_(module.residual[6].weight)
        elif isinstance(module, AttentionBlock):
            torch.nn.init.zeros_(module.proj.weight)
        elif isinstance(module, (Downsample, Upsample)) and module.time_conv is not None:
            weight = module.time_conv.weight.data  # (out, in, 3, 1, 1)
            same = torch.eye(weight.shape[1])[..., None, None]
            weight.zero_()
            if isinstance(module, Downsample):
                weight[:, :, 1:] = 0.5 * same[:, :, None]
            else:
                weight[:, :, 2] = same.repeat(2, 1, 1, 1)
    vae.conv1.bias.data[
        vae.config.z_dim :
    ] = -4  # log-variance: little noise until the means say something


def divergence(mean, logvar):
    """KL from N(0, 1), the mean over all latents."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def psnr(error):
    """In dB, of an error between pictures in [-1, 1]."""
    return -10 * torch.log10(error.detach().square().mean() / 4)


def make_vae(out, args):
    pictures, _ = bank(out)
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig(**VAE))
    quick_start(vae)
    print(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters")

    def loss_of(step, rng):
        clip = step % 2 and step > args.vae_steps // 4  # what a frame looks like comes first
        video = draw(pictures["clip"], rng, 2) if clip else draw(pictures["image"], rng, 8)
        mean, logvar = vae.moments(video, chunk=2)
        output = vae.reconstruct(mean + torch.randn_like(mean) * (0.5 * logvar).exp(), chunk=2)
        kl, error = divergence(mean, logvar), output - video
        loss = error.abs().mean() + error.square().mean() + 3e-4 * kl
        return loss, {"clip" if clip else "image": psnr(error), "kl": kl}

    fit("vae", out, vae, loss_of, args.vae_steps, lr=1.5e-3)
    measure_latents(vae, [to_video(pictures["image"][:512]), to_video(pictures["clip"][:128])])
    vae.save_pretrained(out / "vae")


@torch.inference_mode()
def measure_latents(vae, videos):
    """Sets the latents' statistics, as Wan's were measured on its own data."""
    means = []
    for video in videos:
        for part in video.split(16):
            means.append(vae.moments(part)[0].transpose(0, 1).flatten(1))
    values = torch.cat(means, dim=1)  # (16, all latents)
    vae.set_latent_statistics(values.mean(dim=1), values.std(dim=1))


def make_decoder(out, args):
    """More of the decoder alone: latents stay, and no noise on them asks for caution."""
    sharpen("decoder", out, args.decoder_steps, args).save_pretrained(out / "vae")


def make_refined(out, args):
    """More of all the VAE, with less noise on the latents than `vae` leaves."""
    vae = sharpen("refine", out, args.refine_steps, args, kl=1e-4)
    images = paint(np.random.default_rng(0), 512, video=False)
    clips = paint(np.random.default_rng(0), 128, video=True)
    measure_latents(vae, [images, clips])
    vae.save_pretrained(out / "vae")


def sharpen(name, out, steps, args, kl=None):
    """The VAE in out/vae, trained on new pictures, half of them with a look.

    Its encoder trains only where `kl` is given. Squares, and those of whole windows, count more
    than in `vae`: what is rare is far off before it is learnt.
    """
    vae = WanVAE.from_pretrained(out / "vae").requires_grad_(kl is not None)
    vae.decoder.requires_grad_(True)
    inner = []  # matrices between hidden channels, for Muon
    for parameter_name, p in vae.named_parameters():
        is_inner = p.ndim > 3 and min(p.shape[:2]) > 3 and not parameter_name.startswith("conv1")
        if p.requires_grad and is_inner:
            inner.append(p)

    def loss_of(step, rng):
        total, figures = 0, {}
        for media, count in (("image", 8), ("clip", 2)):
            video = paint(rng, count, media == "clip")
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bfloat16"):
                mean, logvar = (part.float() for part in vae.moments(video, chunk=2))
                noise = 0 if kl is None else torch.randn_like(mean) * (0.5 * logvar).exp()
                error = vae.reconstruct(mean + noise, chunk=2).float() - video
            side = world.WINDOW_SIDE
            windows = F.avg_pool2d(error.abs().mean(dim=1), side, side // 2)  # (B, T, h, w)
            total = total + error.abs().mean()
            total = total + 5 * error.square().mean() + 4 * windows.square().mean()
            if kl is not None:
                total = total + kl * divergence(mean, logvar)
            figures[media] = psnr(error)
        return total / 2, figures

    fit(name, out, vae, loss_of, steps, lr=5e-4, matrices=inner, muon_lr=5e-3)
    return vae


def mllm_config(tokenizer):
    """A small Qwen2.5-VL: pictures of 64x64 are 16 merged tokens of 16x16 pixels each."""
    token = tokenizer.token_to_id
    vision = VisionConfig(
        depth=4,
        hidden_size=128,
        intermediate_size=320,
        num_heads=4,
        patch_size=8,
        window_size=32,
        out_hidden_size=192,
        fullatt_block_indexes=(1, 3),
        tokens_per_second=8,
    )
    return Qwen2_5_VLConfig(
        hidden_size=192,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        vocab_size=tokenizer.get_vocab_size(),
        mrope_section=(8, 8, 8),
        rope_theta=10000.0,
        tie_word_embeddings=True,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )


def conversation(case, rng, edit):
    """(instruction, references, answer): one thing to say about a case.

    With probability `edit` it is what the edit would lead to.
    """
    if rng.random() < edit:
        return case.instruction, case.references, world.caption(case.target_scene)
    if rng.random() < 0.5 or case.source_scene.look:
        return "what is in the picture?", [], world.caption(case.source_scene)
    question, answer = world.pick(rng, world.questions(case.source_scene, rng))
    return question, [], answer


def new_mllm(out):
    tokenizer = Tokenizer.from_file(str(out / "mllm" / "tokenizer.json"))
    torch.manual_seed(0)
    model = Qwen2_5_VL(mllm_config(tokenizer)).initialize()
    # The family's N(0, 0.02) is made for ten times the width: here every color would get the same
    # embedding before any of them is understood.
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            ends_branch = ".o_proj" in name or ".down_proj" in name
            layers = len(model.model.layers) if ends_branch else 0.5
            torch.nn.init.normal_(weight, std=(2 * layers * weight.shape[1]) ** -0.5)
    processor = Processor(
        tokenizer,
        patch_size=8,
        temporal_patch_size=2,
        merge_size=2,
        min_pixels=16 * 16,
        max_pixels=128 * 128,
    )
    return model, processor


class Look(torch.nn.Module):
    """The vision tower with a linear layer that says what is in each of the nine cells.

    The layer reads all tokens of a picture at once.
    """

    words = (("small", "large"), tuple(world.COLORS), world.SHAPES)

    def __init__(self, visual, tokens=16):
        super().__init__()
        self.visual = visual
        self.lengths = [len(words) + 1 for words in self.words]  # the last word is "nothing"
        self.read = torch.nn.Linear(tokens * visual.config.out_hidden_size, 9 * sum(self.lengths))

    def forward(self, patches, grids):
        """-> logits of size, color and shape, each (B, 9, words + 1)."""
        seen = (
            self.visual(patches, grids).unflatten(0, (len(grids), -1)).flatten(1)
        )  # (B, tokens D)
        return self.read(seen).unflatten(1, (9, -1)).split(self.lengths, dim=-1)

    @classmethod
    def labels(cls, caption):
        """A caption of an image -> (3, 9) numbers of the words for size, color and shape."""
        labels = torch.tensor([[len(words)] * 9 for words in cls.words])
        pattern = r"an? (\w+) (\w+) (\w+) at the ([a-z ]+?)(?=,)"
        for *thing, place in re.findall(pattern, caption):
            numbers = [words.index(word) for words, word in zip(cls.words, thing)]
            labels[:, world.PLACES.index(place)] = torch.tensor(numbers)
        return labels


def make_vision(out, args):
    pictures, captions = bank(out)
    model, processor = new_mllm(out)
    look = Look(model.visual)

    def loss_of(step, rng):
        chosen = rng.integers(len(pictures["image"]), size=64)
        images = [Image.fromarray(pictures["image"][i, 0].numpy()) for i in chosen]
        cut = [processor.patches([image], processor.max_pixels) for image in images]
        labels = [look.labels(captions["image"][i]) for i in chosen]
        labels = torch.stack(labels, dim=1)  # (3, B, 9)
        patches, grids = zip(*cut)
        logits = look(torch.cat(patches), grids)
        there = labels[0] < 2  # (B, 9)
        loss, right = 0, {}
        for name, logit, label in zip(("size", "color", "shape"), logits, labels):
            loss = loss + F.cross_entropy(logit.flatten(0, 1), label.flatten())
            right[name] = (logit.argmax(-1) == label)[there].float().mean()
        return loss, right

    fit("vision", out, look, loss_of, args.vision_steps, lr=1e-3)


def make_mllm(out, args):
    model, processor = new_mllm(out)
    processor.save_pretrained(out / "mllm")
    seeing = torch.load(out / "vision.state.pt", weights_only=True)["model"]
    look = Look(model.visual)
    look.load_state_dict(seeing)  # and with it the tower of the model
    print(f"mllm: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    data = {"first": 10**8, "edits": (0.5, 0.5), "precision": args.precision}
    rates = {"lr": 1e-3, "muon_lr": 6e-3, "matrices": inner_matrices(model)}
    teach("mllm", out, model, processor, args.mllm_steps, **data, **rates)


def inner_matrices(model):
    """The matrices of the MLLM's layers and of its vision tower's blocks, for Muon."""
    towers = [*model.model.layers.parameters(), *model.visual.blocks.parameters()]
    return [p for p in towers if p.ndim == 2]


def make_instruct(out, args):
    """More of the MLLM, on what edits lead to and above all those of two parts.

    Pictures it can name by then; which word belongs to which thing comes last.
    """
    model = Qwen2_5_VL.from_pretrained(out / "mllm", dtype=torch.float32)
    processor = Processor.from_pretrained(out / "mllm")
    # Higher and lower rates are worse. After 5,000 steps, a quarter of them on edits of two parts,
    # 51 % of held-out ones were right word for word; at 8/3 of these rates 42 %, at half 47 %.
    rates = {"lr": 2e-4, "muon_lr": 3e-3, "matrices": inner_matrices(model)}
    data = {"first": 2 * 10**8, "edits": (1,), "kinds": TAUGHT}
    steps, precision = args.instruct_steps, args.precision
    teach("instruct", out, model, processor, steps, **data, precision=precision, **rates)


def teach(
    name,
    out,
    model,
    processor,
    steps,
    first,
    edits,
    kinds=(None,),
    precision="float32",
    **rates,
):
    """Trains the MLLM to write answers about the cases of the seeds from `first` on.

    They are of `kinds` (None: any). About each case one thing is said for each of `edits`, the
    probability that it is what the edit leads to.
    """
    tokenizer = processor.tokenizer
    end = tokenizer.token_to_id("<|im_end|>")
    colors = torch.tensor([tokenizer.encode(f" {color}").ids[0] for color in world.COLORS])

    def loss_of(step, rng):
        video, rows, answers = step % 4 == 3, [], []
        for i in range(4 if video else 16):
            case = world.sample(first + 32 * step + i, video, kind=world.pick(rng, kinds))
            shown = {"video": case.source, "fps": 16.0} if video else {"image": case.source[0]}
            for edit in edits:
                instruction, references, answer = conversation(case, rng, edit)
                shown |= {"references": references, "system": SYSTEM_PROMPT}
                row = processor(instruction, **shown)
                answers.append(tokenizer.encode(answer).ids + [end])
                ids = row["input_ids"], torch.tensor(answers[-1:])
                rows.append(row | {"input_ids": torch.cat(ids, dim=1)})
        inputs = processor.collate(rows)
        # In here and not around all steps: until it is left, autocast goes on with the weights that
        # it rounded first.
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            hidden = model(**inputs).float()  # (B, L, D)
        length = hidden.shape[1]
        lengths = torch.tensor([[len(answer)] for answer in answers])
        position = torch.arange(length) >= length - lengths  # (B, L)
        targets = inputs["input_ids"][position]
        states = hidden[:, :-1][position[:, 1:]]
        logits = model.lm_head(states)
        right = (logits.argmax(-1) == targets).float()
        media = "clip " if video else ""
        color = right[torch.isin(targets, colors)].mean()
        return F.cross_entropy(logits, targets), {
            f"{media}right": right.mean(),
            f"{media}color": color,
        }

    fit(name, out, model, loss_of, steps, **rates)
    model.save_pretrained(out / "mllm")


def caption_context(tokenizer, captions, width):
    """The stand-in for T5: (B, TEXT_LENGTH, width).

    Random word vectors plus sinusoidal places, zeros after the end. To each word the others of its
    phrase are added, up to a comma, as T5's words know what they stand with. Words alone leave it
    to the DiT to find out which color goes with which place, and for thousands of steps it paints
    anywhere.
    """
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(tokenizer.get_vocab_size(), width, generator=generator)
    [comma] = tokenizer.encode(",").ids
    place = torch.arange(TEXT_LENGTH)[:, None] / 100 ** (torch.arange(0, width, 2) / width)
    places = torch.cat([place.sin(), place.cos()], dim=1)
    context = torch.zeros(len(captions), TEXT_LENGTH, width)
    for row, caption in zip(context, captions):
        ids = torch.tensor(tokenizer.encode(caption).ids[:TEXT_LENGTH])
        phrase = F.one_hot((ids == comma).cumsum(0)).float()  # (words, phrases)
        sums = phrase.T @ table[ids] / phrase.sum(dim=0)[:, None] ** 0.5
        row[: len(ids)] = table[ids] + phrase @ sums + places[: len(ids)]
    return context


@torch.inference_mode()
def latents_of(vae, pictures):
    parts = tqdm(pictures.split(32), desc="encode", disable=None)
    return torch.cat([vae.encode(to_video(part)) for part in parts])


class Where(torch.nn.Module):
    """The DiT with a linear layer that says in which frame, row and column each token stands.

    The layer reads from the third block. Rotary positions say how far apart two tokens are, and not
    where one is: that can only be made out from the edges, across noise. Left to itself the DiT
    still painted things anywhere after 1,500 steps; asked, it knows the places after 150.
    """

    def __init__(self, dit, grid):
        super().__init__()
        self.dit, self.grid = dit, grid
        self.read = torch.nn.Linear(dit.config.dim, sum(grid))
        dit.blocks[2].register_forward_hook(lambda block, inputs, x: setattr(self, "x", x))

    def forward(self, z, t, context):
        """-> velocity like z, and the cross-entropy of the places."""
        velocity = self.dit(z, t, context)
        grid = self.dit.grid(z.shape)
        axes = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
        labels = torch.stack(axes).flatten(1)  # (3, L)
        logits = self.read(self.x).split(self.grid, dim=-1)  # (B, L, length) of each axis
        loss = 0
        for logit, label in zip(logits, labels):
            loss = loss + F.cross_entropy(logit.movedim(2, 1), label.expand(len(z), -1))
        return velocity, loss


def make_dit(out, args):
    pictures, captions = bank(out)
    vae = WanVAE.from_pretrained(out / "vae")
    tokenizer = Tokenizer.from_file(str(out / "mllm" / "tokenizer.json"))
    file = out / "latents.pt"
    if not file.exists():
        save({name: latents_of(vae, value) for name, value in pictures.items()}, file)
    latents = torch.load(file, weights_only=True)
    torch.manual_seed(0)
    dit = WanDiT(WanDiTConfig(**DIT)).initialize()
    print(f"dit: {sum(p.numel() for p in dit.parameters()) / 1e6:.2f} M parameters")
    sampler = FlowSampler(shift=3.0)
    where = Where(dit, dit.grid(latents["clip"].shape))

    def loss_of(step, rng):
        name, count = ("clip", 4) if step % 4 == 3 else ("image", 16)
        chosen = rng.integers(len(latents[name]), size=count)
        x = latents[name][torch.from_numpy(chosen)]
        context = caption_context(tokenizer, [captions[name][i] for i in chosen], DIT["text_dim"])
        sigma = sampler.draw_sigma(count)
        noise = torch.randn_like(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bfloat16"):
            velocity, places = where(sampler.add_noise(x, noise, sigma), 1000 * sigma, context)
        loss = F.mse_loss(velocity.float(), sampler.target(x, noise))
        return loss + 0.2 * places, {name: loss, "places": places}

    matrices = [p for p in dit.blocks.parameters() if p.ndim == 2]
    fit("dit", out, where, loss_of, args.dit_steps, lr=1e-3, matrices=matrices)
    dit.save_pretrained(out / "dit")


def ship(out, args):
    """Writes what the repository holds beside this script: all but the VAE in half precision."""
    model = InstructX.from_pretrained(out, instructx=args.trained)
    model.save_pretrained(HERE / "instructx", dit=True, dtype=torch.float16)
    Qwen2_5_VL.from_pretrained(out / "mllm", dtype=torch.float16).save_pretrained(HERE / "mllm")
    model.processor.save_pretrained(HERE / "mllm")
    model.vae.save_pretrained(HERE / "vae")


PARTS = {
    "tokenizer": make_tokenizer,
    "vae": make_vae,
    "decoder": make_decoder,
    "refine": make_refined,
    "vision": make_vision,
    "mllm": make_mllm,
    "instruct": make_instruct,
    "dit": make_dit,
    "ship": ship,
}


def main(arguments=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    text = "folder for mllm/, vae/, dit/ and all states"
    parser.add_argument("--out", type=Path, default=Path("runs/base"), help=text)
    parser.add_argument("--vae-steps", type=int, default=2800)
    parser.add_argument("--decoder-steps", type=int, default=1900)
    parser.add_argument("--refine-steps", type=int, default=2400)
    parser.add_argument("--vision-steps", type=int, default=550)
    parser.add_argument("--mllm-steps", type=int, default=3450)
    parser.add_argument("--instruct-steps", type=int, default=10000)
    parser.add_argument("--dit-steps", type=int, default=2600)
    text = "for ship: what train.py wrote"
    trained = Path("runs/stage3/instructx")
    parser.add_argument("--trained", type=Path, default=trained, help=text)
    choices, text = ("float32", "bfloat16"), "of all but vae and vision"
    parser.add_argument("--precision", choices=choices, default="float32", help=text)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        start = time.time()
        PARTS[part](args.out, args)
        print(f"{part}: {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
