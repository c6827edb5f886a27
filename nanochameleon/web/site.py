"""The site: all that handlers of requests need, in request.app.state.site. A study has its own (judge.py)."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nanochameleon.web.metrics import Metrics
from nanochameleon.web.uploads import Uploads

if TYPE_CHECKING:  # a study runs without torch
    from nanochameleon.training.run import Run
    from nanochameleon.web.worker import Worker


@dataclass
class Site:
    name: str  # of the model, as the API says it: never a path
    run: "Run"
    worker: "Worker"
    red_team: Path | None = None  # the log
    metrics: Metrics = field(default_factory=Metrics)
    red_team_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    uploads: Uploads = field(default_factory=Uploads)
