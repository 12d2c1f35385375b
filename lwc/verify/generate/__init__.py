"""Strategies that draw typed graphs: random ones, motifs of real models, near misses."""
