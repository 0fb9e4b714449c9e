from __future__ import annotations

import os


class Platform:
    def is_cpu(self) -> bool:
        return os.environ.get("STANDIN_PLATFORM", "cpu") == "cpu"


current_platform = Platform()
