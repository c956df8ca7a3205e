"""What computes here, and why."""

import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch
from threadpoolctl import threadpool_info

from sparsebreg import backends
from sparsebreg._version import __version__
from sparsebreg.core import extension
from sparsebreg.swap import costs


@dataclass(frozen=True)
class Info:
    """Facts about this process; prints as a list."""

    version: str
    backend: str
    why: str
    backends: dict[str, str]
    isa: str
    isas: list[str]
    threads: int
    openmp: list[str]
    torch: str
    python: str
    machine: str
    cpus: int
    costs: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        usable = "; ".join(f"{n}: {cause or 'available'}" for n, cause in self.backends.items())
        lines = {
            "sparsebreg": self.version,
            "backend": f"{self.backend} ({self.why})",
            "backends": usable,
            "isa": f"{self.isa} (this CPU runs: {', '.join(self.isas) or 'unknown to this build'})",
            "threads": f"{self.threads} of {self.cpus} processors",
            "OpenMP runtimes": "; ".join(self.openmp) or "none loaded",
            "costs": self.costs,
            "torch": self.torch,
            "python": f"{self.python} on {self.machine}",
        }
        return "\n".join(f"{name + ':':<17}{text}" for name, text in lines.items())


def info() -> Info:
    """The backend in use and why, its instruction set, threads, OpenMP runtimes, and by what costs "auto" decides.

    Raises:
        BackendError, ValueError: if the backend asked for by name cannot be used.
    """
    native = extension.native()
    backend = backends.current()
    runtimes = [
        f"{m['prefix']} ({m['num_threads']} threads)" for m in threadpool_info() if m.get("user_api") == "openmp"
    ]
    return Info(
        version=__version__,
        backend=backend.name,
        why=backends.why(),
        backends=backends.available(),
        isa=getattr(backend, "isa", "torch" if backend.name == "reference" else "llvm"),
        isas=native.available_isas() if native else [],
        threads=torch.get_num_threads(),
        openmp=runtimes,
        torch=str(torch.__version__),
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        cpus=os.cpu_count() or 1,
        costs=costs.current()[1],
    )
