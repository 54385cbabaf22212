# syntax=docker/dockerfile:1
#   docker build -t gpt2 .
#   docker run -it --gpus all -v gpt2:/home/gpt2/project gpt2                  the pipeline
#   docker run -it --gpus all -v gpt2:/home/gpt2/project gpt2 python src/infer.py
FROM python:3.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PATH=/home/gpt2/venv/bin:$PATH

# git is what DVC finds its checkout and its experiments by, gcc what torch.compile builds kernels with.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc git libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 gpt2 \
    && install --directory --owner gpt2 --group gpt2 /home/gpt2/project

USER gpt2
WORKDIR /home/gpt2/project

# The packages change seldom and are by far the largest layer, so they come before the code.
COPY --chown=gpt2 requirements.txt .
RUN python -m venv /home/gpt2/venv && pip install -r requirements.txt

COPY --chown=gpt2 . .

# The image's own checkout: dvc exp needs a commit to start from.
RUN git config --global user.name gpt2 \
    && git config --global user.email gpt2@localhost \
    && git init --quiet --initial-branch main \
    && git add --all \
    && git commit --quiet --message "The project as it was built into the image"

CMD ["dvc", "repro"]
