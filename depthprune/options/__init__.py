"""What each method lets a user choose: one frozen dataclass per method and file.

A run's `Config` holds one of them. Raises ConfigError for a value that no run can use.
"""

from depthprune.options.auxiliary import Auxiliary as Auxiliary
from depthprune.options.gates import Gates as Gates
from depthprune.options.implosion import Implosion as Implosion
from depthprune.options.netcut import NetCut as NetCut
from depthprune.options.sidenet import SideNet as SideNet

Options = Gates | NetCut | Implosion | SideNet | Auxiliary
KINDS = Gates, NetCut, Implosion, SideNet, Auxiliary
METHODS: dict[str, type] = {kind.method: kind for kind in KINDS}
