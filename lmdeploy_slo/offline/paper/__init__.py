"""The setting of Huang et al. (arXiv 2504.14966): its requests, its static model and a persistent batch beside it."""
