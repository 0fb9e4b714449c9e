"""Gates by name. A package of yours adds one by an entry point of the group ``mixmerge.gate``."""

from __future__ import annotations

GATES: dict[str, str] = {
    "given": "mixmerge.bank.gate:RowGate",
    "mean": "mixmerge.bank.gates.mean:MeanGate",
    "phatgoose": "mixmerge.bank.gates.phatgoose:PhatgooseGate",
    "arrow": "mixmerge.bank.gates.arrow:ArrowGate",
    "average_activation": "mixmerge.bank.gates.average_activation:AverageActivationGate",
    "glider": "mixmerge.bank.gates.glider:GliderGate",
    "smile": "mixmerge.bank.gates.smile:SmileGate",
    "xlora": "mixmerge.bank.gates.xlora:XLoraGate",
    "lora_mixer": "mixmerge.bank.gates.lora_mixer:LoraMixerGate",
    "lorahub": "mixmerge.bank.gates.lorahub:LorahubGate",
    "smora": "mixmerge.bank.gates.ranks:SmoraGate",
    "flylora": "mixmerge.bank.gates.ranks:FlyloraGate",
    "self_rank": "mixmerge.bank.gates.ranks:SelfRankGate",
    "router": "mixmerge.bank.gates.router:Router",
}
