"""LMDeploy as this package needs it: a series of small patches, put into its modules in memory while they are imported.

`series` reads the patches, `installed` says what they meet on this machine, `loader` applies them on import, and
`hooks` is what the inserted lines call.
"""
