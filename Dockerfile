#   docker build -t gpt2 .
#   docker run -it --gpus all --stop-timeout 60 -v gpt2:/project gpt2                    # dvc repro
#   docker run -it --gpus all -v gpt2:/project gpt2 python src/infer.py
#   docker run -it -p 5000:5000 -v gpt2:/project gpt2 mlflow ui --host 0.0.0.0
#   docker run -it -p 8000:8000 -v gpt2:/project gpt2 python src/serve.py --host 0.0.0.0
# Without an NVIDIA GPU, drop --gpus all. The volume keeps the results, and the code that they were made with: after a
# new build, start with a new volume (docker volume rm gpt2). Your own clone may take its place, as you:
#   docker run -it --user "$(id -u):$(id -g)" -v "$PWD":/project gpt2
# To reach `mlflow ui` by a name other than localhost, give it --allowed-hosts NAME:5000.
# Ctrl-C and docker stop save a training. compose.yaml runs it beside a team's servers, with health checks.
FROM python:3.11-slim-bookworm

# Any user may run the image, also one whom it does not know, and with a root file system that is read-only
# (--read-only --tmpfs /tmp).
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PATH=/opt/venv/bin:$PATH \
    USER=gpt2 HOME=/tmp DVC_SITE_CACHE_DIR=/project/.cache/dvc

# DVC needs git, torch.compile needs g++, and docker stop needs an init that passes its signal on to the whole group.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git tini \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system user.name gpt2 \
    && git config --system user.email gpt2@localhost \
    && git config --system init.defaultBranch main \
    && git config --system safe.directory '*' \
    && useradd --uid 1000 --home-dir /tmp gpt2 \
    && install --directory --owner 1000 --group 1000 --mode 777 /project

# The packages change less often than the code, so their layer comes first. PIP_EXTRA_INDEX_URL may name an index of CPU
# builds of torch, for an image without CUDA's libraries, REQUIREMENTS may be tests/requirements.txt, for the tests too.
ARG PIP_EXTRA_INDEX_URL
ARG REQUIREMENTS=requirements.txt
ARG PACKAGES=""
COPY requirements.txt /tmp/requirements.txt
COPY tests/requirements.txt /tmp/tests/requirements.txt
# hadolint ignore=SC2086
RUN python -m venv /opt/venv && pip install --no-cache-dir -r /tmp/$REQUIREMENTS $PACKAGES

COPY .docker/entrypoint /usr/local/bin/
WORKDIR /project
COPY --chown=1000:1000 . .

USER 1000:1000
# dvc exp needs a commit to start from. Texts and weights that all may read are not written again for another mode.
RUN git init --quiet \
    && git add --all \
    && git commit --quiet --message "The project as it was built into the image" \
    && find . ! \( \( -path './data/raw/*' -o -path './data/pretrained/*' \) -type f -perm -444 \) -exec chmod a+rwX {} +

EXPOSE 5000 8000
STOPSIGNAL SIGINT
ENTRYPOINT ["tini", "-g", "--", "entrypoint"]
CMD ["dvc", "repro"]
