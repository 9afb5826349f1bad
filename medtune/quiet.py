"""The libraries' messages to programmers, off."""

import logging
import warnings


def quiet_libraries() -> None:
    """Leave the screen to what the user needs to know; train.log has the rest."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # Deprecations speak to programmers; bitsandbytes looks on a CPU for a kernel that it does not need.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.captureWarnings(True)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.WARNING)  # rouge_score's
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
