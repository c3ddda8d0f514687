"""What the simulator is made of: requests, engine instances in virtual time, placement, and a prefix cache."""
