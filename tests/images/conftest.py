from image_examples import specs  # noqa: F401 (a fixture)
