"""What lies between two stages, on disk: profiles, plans, experts, evaluations."""
