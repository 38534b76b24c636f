"""Floor 9: one uptraining: its resolved settings, and the job from its staging directory to the checkpoint it leaves."""
