"""Shapes of real layers, as data.

Linear: (in, out). Conv2d: (in channels, out channels, kernel, stride, padding, input height and width).
"""

LINEAR = {
    "mlp_784x512": (784, 512),
    "mlp_784x1024": (784, 1024),
    "mlp_1024x1024": (1024, 1024),
    "mlp_4096x4096": (4096, 4096),
    "transformer_768x3072": (768, 3072),
    "transformer_3072x768": (3072, 768),
}

CONV2D = {
    "convnet_64x64_5x5_12": (64, 64, 5, 1, 0, 12),
    "resnet18_64x64_3x3_32": (64, 64, 3, 1, 1, 32),
    "resnet18_128x128_3x3_16": (128, 128, 3, 1, 1, 16),
    "resnet18_256x256_3x3_8": (256, 256, 3, 1, 1, 8),
    "resnet18_512x512_3x3_4": (512, 512, 3, 1, 1, 4),
    "resnet18_64x128_3x3_s2_32": (64, 128, 3, 2, 1, 32),
    "resnet18_128x256_3x3_s2_16": (128, 256, 3, 2, 1, 16),
    "resnet18_256x512_3x3_s2_8": (256, 512, 3, 2, 1, 8),
    "resnet18_64x128_1x1_s2_32": (64, 128, 1, 2, 0, 32),
    "resnet18_128x256_1x1_s2_16": (128, 256, 1, 2, 0, 16),
    "resnet18_256x512_1x1_s2_8": (256, 512, 1, 2, 0, 8),
}
