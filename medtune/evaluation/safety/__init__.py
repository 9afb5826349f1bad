"""Safety prompts, the rubric that judges answers to them, and the gate."""
