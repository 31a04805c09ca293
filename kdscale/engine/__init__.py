"""The one door to DeepSpeed: models, engines, checkpoints and exports."""
