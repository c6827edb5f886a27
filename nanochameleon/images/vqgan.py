"""The image tokenizer's network: encoder, quantizer, decoder, in the layout (and with the names) of the release.

An image (3, R, R) becomes a grid of R/f x R/f vectors. Each is replaced by its nearest codebook vector, and the decoder
makes an image from these (VQGAN, arXiv 2012.09841). config.VQGANConfig has the release's sizes. Losses are in
losses.py, pixels and files in tokenizer.py.

Shapes: B images, C channels, H = W the side at that level.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochameleon.config import VQGANConfig
from nanochameleon.images.quantizer import Quantizer

BATCH_MULTIPLE = 64  # of the different windows that the encoder reads at a time


def group_norm(channels: int, n_groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(n_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 shortcut where the number of channels changes."""

    def __init__(self, c_in: int, c_out: int, n_groups: int):
        super().__init__()
        self.norm1 = group_norm(c_in, n_groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out, n_groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))  # (B, c_out, H, W)
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention over all positions with one head and 1x1 convolutions, added to its input."""

    def __init__(self, channels: int, n_groups: int):
        super().__init__()
        self.norm = group_norm(channels, n_groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)  # (B, C, H, W)
        # each position is a token of C values; the 1x1 convolutions are its linear layers
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))  # (B,1,HW,C)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, 1, HW, C)
        return x + self.proj_out(out.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the side: one row and column of zeros at the bottom right, then a 3x3 convolution with stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # padding on two sides only, as the release's weights expect; padding=1 would shift every level by half a pixel
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double the side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # a transposed convolution would leave a checkerboard, since its windows overlap unevenly
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


def middle(channels: int, cfg: VQGANConfig) -> nn.Module:
    """The blocks at the lowest resolution: residual, attention (if cfg.mid_attention), residual."""
    mid = nn.Module()
    mid.block_1 = ResnetBlock(channels, channels, cfg.n_groups)
    mid.attn_1 = AttnBlock(channels, cfg.n_groups) if cfg.mid_attention else nn.Identity()
    mid.block_2 = ResnetBlock(channels, channels, cfg.n_groups)
    return mid


def run_middle(mid: nn.Module, x: Tensor) -> Tensor:
    return mid.block_2(mid.attn_1(mid.block_1(x)))


class Encoder(nn.Module):
    """(B, 3, R, R) -> (B, z_channels, R/f, R/f)."""

    def __init__(self, cfg: VQGANConfig):
        super().__init__()
        self.conv_in = nn.Conv2d(3, cfg.ch, 3, padding=1)
        # plain modules with the release's parameter names: down.0.block.0.conv1.weight, ...
        self.down = nn.ModuleList()
        channels = cfg.ch
        for i, mult in enumerate(cfg.ch_mult):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(cfg.n_res_blocks):
                level.block.append(ResnetBlock(channels, cfg.ch * mult, cfg.n_groups))
                channels = cfg.ch * mult
            level.downsample = Downsample(channels) if i < len(cfg.ch_mult) - 1 else nn.Identity()
            self.down.append(level)
        self.mid = middle(channels, cfg)
        self.norm_out = group_norm(channels, cfg.n_groups)
        self.conv_out = nn.Conv2d(channels, cfg.z_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        # 1. To ch channels at full resolution
        h = self.conv_in(pixels)  # (B, ch, R, R)
        # 2. Level by level: residual blocks, then half the side
        for level in self.down:
            for block in level.block:
                h = block(h)  # (B, ch * ch_mult[i], R / 2^i, R / 2^i)
            h = level.downsample(h)  # the last level keeps its side
        # 3. The middle sees the whole grid, if it has attention; then to z_channels
        return self.conv_out(F.silu(self.norm_out(run_middle(self.mid, h))))


class Decoder(nn.Module):
    """(B, z_channels, R/f, R/f) -> (B, 3, R, R). `up[i]` is level i, so forward runs `up` backwards."""

    def __init__(self, cfg: VQGANConfig):
        super().__init__()
        channels = cfg.ch * cfg.ch_mult[-1]
        self.conv_in = nn.Conv2d(cfg.z_channels, channels, 3, padding=1)
        self.mid = middle(channels, cfg)
        levels = []
        for i, mult in reversed(list(enumerate(cfg.ch_mult))):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(cfg.n_res_blocks + 1):  # one more than the encoder, as in the release
                level.block.append(ResnetBlock(channels, cfg.ch * mult, cfg.n_groups))
                channels = cfg.ch * mult
            level.upsample = Upsample(channels) if i > 0 else nn.Identity()
            levels.insert(0, level)  # built from the last level to the first, stored in the encoder's order
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(channels, cfg.n_groups)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        # 1. The middle, at the lowest resolution
        h = run_middle(self.mid, self.conv_in(z))  # (B, ch * ch_mult[-1], R/f, R/f)
        # 2. Level by level, from the last to the first: residual blocks, then twice the side
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)  # (B, ch * ch_mult[i], R / 2^i, R / 2^i)
            h = level.upsample(h)  # level 0 keeps its side
        # 3. To pixels
        return self.conv_out(F.silu(self.norm_out(h)))


def split_windows(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> its windows of `side` x `side` in raster order: (B * H/side * W/side, C, side, side)."""
    b, c, h, w = x.shape
    # (B, C, H/s, s, W/s, s) -> (B, H/s, W/s, C, s, s)
    return x.view(b, c, h // side, side, w // side, side).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, side, side)


def join_windows(windows: Tensor, across: int) -> Tensor:
    """Inverse of split_windows for square images of `across` x `across` windows."""
    _, c, side, _ = windows.shape
    # (B, H/s, W/s, C, s, s) -> (B, C, H/s, s, W/s, s)
    x = windows.view(-1, across, across, c, side, side).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(-1, c, across * side, across * side)


class VQGAN(nn.Module):
    """Image -> codes -> image. Pixels are float in [-1, 1], codes int64 (B, codes_per_image) in raster order.

    With `cfg.window` set, the encoder sees one window at a time, so a code depends on its own pixels alone. An encoder
    that sees the whole image, as the release's does, lets the surroundings leak into each code; GroupNorm's statistics
    alone do that. In the toy world 4.3 of the 7.4 bits of a code were such noise, which a transformer then has to
    predict (docs/log.md). The decoder always sees the whole grid.
    """

    def __init__(self, cfg: VQGANConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.quant_conv = nn.Conv2d(cfg.z_channels, cfg.embed_dim, 1)
        self.quantize = Quantizer(cfg.n_codes, cfg.embed_dim)
        self.post_quant_conv = nn.Conv2d(cfg.embed_dim, cfg.z_channels, 1)
        self.decoder = Decoder(cfg)

    @staticmethod
    def from_state(cfg: VQGANConfig, state: dict[str, Tensor]) -> "VQGAN":
        """A VQGAN with these weights. Without a decoder's weights, as transformers saves it, `decoder` is None."""
        with torch.device("meta"):  # random weights would be replaced at once
            vqgan = VQGAN(cfg)
        if not any(name.startswith("decoder.") for name in state):
            vqgan.decoder = None
        vqgan.load_state_dict(state, assign=True)
        vqgan.quantize.reset_averages()
        return vqgan

    def latents(self, pixels: Tensor) -> Tensor:
        """(B, 3, R, R) -> the vectors to be quantized (B, embed_dim, grid, grid)."""
        if self.cfg.window is None:
            return self.quant_conv(self.encoder(pixels))
        windows = split_windows(pixels, self.cfg.window)  # (B * windows, 3, side, side)
        # Drawn images repeat themselves, so each different window goes through the encoder once.
        different, which = torch.unique(windows.flatten(1), dim=0, return_inverse=True)
        # Zeros fill them up to a multiple: torch compiles each convolution again for every number of images.
        filled = F.pad(different, (0, 0, 0, -len(different) % BATCH_MULTIPLE))
        latents = self.quant_conv(self.encoder(filled.view(-1, *windows.shape[1:])))
        return join_windows(latents[which], pixels.shape[-1] // self.cfg.window)

    def pixels(self, quantized: Tensor) -> Tensor:
        """Quantized vectors (B, embed_dim, grid, grid) -> (B, 3, R, R), not clamped."""
        return self.decoder(self.post_quant_conv(quantized))

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, R, R) -> codes (B, grid*grid)."""
        return self.quantize.codes(self.latents(pixels))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, grid*grid) -> (B, 3, R, R), not clamped."""
        return self.pixels(self.quantize.lookup(codes, math.isqrt(codes.shape[1])))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, R, R) -> reconstruction (B, 3, R, R), latents (B, E, g, g), their codebook vectors, codes (B, g*g)."""
        latents = self.latents(pixels)
        # `passed` has the codebook's values and passes the gradient to the latents
        passed, codes, quantized = self.quantize(latents)
        return self.pixels(passed), latents, quantized, codes
