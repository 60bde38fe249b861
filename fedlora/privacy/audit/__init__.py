"""Proof by trial that private training is private: oracles for every part, and a blind audit."""
