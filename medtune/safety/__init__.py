"""Questions that need a safe answer, and the rubric that judges whether an answer is one."""
