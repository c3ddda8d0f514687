"""Generated from proto/lmdeploy_slo/v1/inference.proto by `make proto`. Do not edit."""
