"""Rows of figures: how they are made, printed, saved as JSON and read again.

A row holds one value of one variant, its ratio to another variant, and its share of the limit of limits.py. Both are
"more is better": the other variant's time or memory over this one's, and the time that the limit takes over this one's.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from nanochameleon.errors import UserError, say
from nanochameleon.files import commit, write_file

NO_LIMITS: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Row:
    bench: str
    case: str
    variant: str
    value: float
    unit: str
    ratio: float | None
    ratio_to: str | None
    device: str
    torch: str
    commit: str
    of_limit: float | None = None  # None where no limit is known


# ---------------------------------------------------------------------------------------------------------------------
# Making rows


def make_row(
    bench: str, case: str, variant: str, value: float, unit: str, device: torch.device,
    ratio: float | None = None, ratio_to: str | None = None, of_limit: float | None = None,
) -> Row:  # fmt: skip
    where = device_name(device), torch.__version__, commit()
    return Row(bench, case, variant, value, unit, ratio, ratio_to, *where, of_limit)


def rows_against_peers(
    bench: str, case: str, ours: str, seconds: dict[str, float], amount: float, unit: str, device: torch.device,
    limits: Mapping[str, float] = NO_LIMITS,
) -> list[Row]:  # fmt: skip
    """Return a row of `ours` for each peer, with the ratio to it, then a row for each peer.

    seconds, limits: by variant. amount: what one run makes, such as tokens. The value is amount / seconds, or the
    milliseconds for one of them where the unit starts with "ms".
    """

    def row(name: str, ratio: float | None = None, ratio_to: str | None = None) -> Row:
        value = seconds[name] * 1e3 / amount if unit.startswith("ms") else amount / seconds[name]
        of_limit = limits[name] / seconds[name] if name in limits else None
        return make_row(bench, case, name, value, unit, device, ratio, ratio_to, of_limit)

    peers = [name for name in seconds if name != ours]
    rows = [row(ours, seconds[peer] / seconds[ours], peer) for peer in peers] or [row(ours)]
    return rows + [row(peer) for peer in peers]


def rows_against_one(
    bench: str, case: str, costs: dict[str, float], ratio_to: str, unit: str, device: torch.device,
    limits: Mapping[str, float] = NO_LIMITS,
) -> list[Row]:  # fmt: skip
    """Return a row for each variant with its time or memory, and the ratio to the variant `ratio_to`.

    limits: by variant, in the same unit.
    """

    def row(name: str, cost: float) -> Row:
        of_limit = limits[name] / cost if name in limits else None
        return make_row(bench, case, name, cost, unit, device, costs[ratio_to] / cost, ratio_to, of_limit)

    return [row(*each) for each in costs.items()]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    n_threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {n_threads} thread{'s' if n_threads > 1 else ''}"


# ---------------------------------------------------------------------------------------------------------------------
# Showing them


def show(row: Row) -> None:
    against = f"  {row.ratio:6.2f} x {row.ratio_to}" if row.ratio_to else ""
    limit = "" if row.of_limit is None else f"  {row.of_limit:5.0%} of the limit"
    say(f"{row.case:34} {row.variant:28} {row.value:10.4g} {row.unit}{against}{limit}")


def save(rows: Sequence[Row], path: Path) -> None:
    write_file(path, (json.dumps([asdict(row) for row in rows], indent=1) + "\n").encode())


def load(path: Path) -> list[Row]:
    """Read the rows that `save` wrote. Raises UserError where there are none."""
    try:
        return [Row(**row) for row in json.loads(path.read_text())]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise UserError(f"{path} holds no rows: name a file that --json wrote") from None
