"""Preparation: a source of images made into a prepared folder, shard by shard; without Ray."""
