"""For tests of this package, and of engines and policies that plug into it; needs pytest only in `engine_contract`."""
