"""What a C compiler makes of the engine's steps on the CPU, where there is one (or what it made is there already)."""
