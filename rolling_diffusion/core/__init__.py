"""The method: orders, plans, cohorts, the rollout, memory. Torch, greenlet and the standard library only."""
