"""The world that the embedded model draws: procedural storybook scenes, their captions, and exact detectors."""
