"""How an expert answers: one small protocol (``base.Engine``), and the engines that keep it.

``ENGINES`` is the table of their names; a package of yours adds one by an entry point of the group
``mixmerge.engine``, and tests it with ``mixmerge.engines.contract``. Nothing here is loaded before it is used.
"""

from __future__ import annotations

ENGINES: dict[str, str] = {
    "transformers": "mixmerge.engines.local:TransformersEngine",
    "dynamic": "mixmerge.dynamic.engine:DynamicEngine",
    "tasks": "mixmerge.dynamic.task_engine:TaskEngine",
    "latent": "mixmerge.latent.engine:LatentEngine",
    "fusion": "mixmerge.logits.engine:FusionEngine",
    "openai": "mixmerge.engines.openai:OpenAIEngine",
    "vllm": "mixmerge.engines.vllm:VllmEngine",
    "echo": "mixmerge.engines.echo:EchoEngine",
}
