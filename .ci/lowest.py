"""Print constraints for pip: of each dependency the oldest version that pyproject.toml claims.

torch stands apart: its old builds are gigabytes, and the oldest one is not tried.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for line in [
    *project["dependencies"],
    *(line for extra in project["optional-dependencies"].values() for line in extra),
]:
    if (bound := re.fullmatch(r"([\w-]+)>=([\w.]+)", line)) and bound[1] != "torch":
        print(f"{bound[1]}=={bound[2]}")
