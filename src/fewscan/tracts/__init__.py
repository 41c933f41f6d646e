"""White matter: diffusion scans to inputs of a network, bundles and their figures, semi-synthetic cohorts."""
