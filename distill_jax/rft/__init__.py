"""Reinforcement fine-tuning of the teacher: rewards, advantages, losses, the step, the calibration loop."""
