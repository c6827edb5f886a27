"""What handlers of requests need. They find it in request.app.state.site."""

from dataclasses import dataclass, field
from pathlib import Path

from nanochameleon.training.run import Run
from nanochameleon.web.uploads import Uploads
from nanochameleon.web.worker import Worker


@dataclass
class Site:
    name: str  # of the model, as the API says it: never a path
    run: Run
    worker: Worker
    red_team: Path | None = None  # the log
    uploads: Uploads = field(default_factory=Uploads)
