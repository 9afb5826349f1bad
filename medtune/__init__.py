"""medtune: QLoRA fine-tuning of LLaMA 3 on patient-doctor conversations, as sweeps you can compare."""

import os

__version__ = "0.1.0"

# Medical text stays on this machine: no dependency may report on its use. Set before any of them is imported.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["WANDB_ERROR_REPORTING"] = "false"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# The tokenizer's threads deadlock in the DataLoader's forked workers.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Members of a sweep say the same things: Ray would leave out whose line comes second.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
