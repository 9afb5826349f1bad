"""Many members on one base: grouped, packed, resumed. `hydra/launcher=packed` is its door."""
