{{/* Names, labels and what all pods have in common. Called by every other template. */}}

{{- define "fraudgate.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "fraudgate.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "fraudgate.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "fraudgate.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Takes {root, component}. Never changes from release to release: selectors are immutable. */}}
{{- define "fraudgate.selector" -}}
app.kubernetes.io/name: {{ include "fraudgate.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "fraudgate.labels" -}}
{{ include "fraudgate.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* Takes {root, image: gateway | jobs | export}. */}}
{{- define "fraudgate.image" -}}
{{- $image := index .root.Values.images .image -}}
{{- $name := $image.repository -}}
{{- if .root.Values.images.registry -}}{{- $name = printf "%s/%s" (trimSuffix "/" .root.Values.images.registry) $name -}}{{- end -}}
{{- $name = printf "%s:%s" $name (default .root.Chart.AppVersion .root.Values.images.tag) -}}
{{- if $image.digest -}}{{- $name = printf "%s@%s" $name $image.digest -}}{{- end -}}
{{- $name -}}
{{- end -}}

{{- define "fraudgate.serviceAccount" -}}
{{- default (include "fraudgate.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}

{{/* Of a pod. Takes the root. Service links would set FRAUDGATE_GATEWAY_PORT and the like, which are settings: they must stay off. */}}
{{- define "fraudgate.podBasics" -}}
serviceAccountName: {{ include "fraudgate.serviceAccount" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.images.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Takes the values of a component: where its pods may run. */}}
{{- define "fraudgate.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "fraudgate.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{/* Addresses: embedded, or from the values. Each fails where neither is there. */}}
{{- define "fraudgate.kafka" -}}
{{- if .Values.embedded.kafka.enabled -}}{{ include "fraudgate.fullname" . }}-kafka:9092
{{- else -}}{{ required "kafka.bootstrap is needed, or embedded.kafka.enabled" .Values.kafka.bootstrap }}{{- end -}}
{{- end -}}

{{- define "fraudgate.schemaRegistry" -}}
{{- if .Values.embedded.schemaRegistry.enabled -}}http://{{ include "fraudgate.fullname" . }}-registry:8080/apis/ccompat/v7
{{- else -}}{{ required "schemaRegistry.url is needed, or embedded.schemaRegistry.enabled" .Values.schemaRegistry.url }}{{- end -}}
{{- end -}}

{{- define "fraudgate.mlflow" -}}
{{- if .Values.embedded.mlflow.enabled -}}http://{{ include "fraudgate.fullname" . }}-mlflow:5000
{{- else -}}{{ required "mlflow.url is needed, or embedded.mlflow.enabled" .Values.mlflow.url }}{{- end -}}
{{- end -}}

{{- define "fraudgate.tables" -}}
{{- default "/var/lib/fraudgate-tables" .Values.storage.tables -}}
{{- end -}}

{{- define "fraudgate.endpoint" -}}
{{- if .Values.embedded.objectStore.enabled -}}http://{{ include "fraudgate.fullname" . }}-objects:7070
{{- else -}}{{ .Values.storage.endpoint }}{{- end -}}
{{- end -}}

{{- define "fraudgate.hasPolicy" -}}
{{- if or .Values.policy.files .Values.policy.configMap.name -}}yes{{- end -}}
{{- end -}}

{{/* The settings of one component as FRAUDGATE_* variables, for its ConfigMap. Takes {root, own: its own settings}. */}}
{{- define "fraudgate.settings" -}}
{{- $v := .root.Values -}}
FRAUDGATE_HOME: /var/lib/fraudgate
FRAUDGATE_HOST: 0.0.0.0
FRAUDGATE_KAFKA_BOOTSTRAP: {{ include "fraudgate.kafka" .root | quote }}
FRAUDGATE_REGISTRY_URL: {{ include "fraudgate.schemaRegistry" .root | quote }}
FRAUDGATE_MLFLOW_URL: {{ include "fraudgate.mlflow" .root | quote }}
FRAUDGATE_TABLES_URI: {{ include "fraudgate.tables" .root | quote }}
{{- if $v.embedded.redis.enabled }}
FRAUDGATE_REDIS_URL: redis://{{ include "fraudgate.fullname" .root }}-redis:6379/0
{{- else if not $v.redis.urlSecret.name }}
FRAUDGATE_REDIS_URL: {{ required "redis.url or redis.urlSecret is needed, or embedded.redis.enabled" $v.redis.url | quote }}
{{- end }}
{{- if $v.jobs.enabled }}
FRAUDGATE_CONSOLE_JOBS_URL: http://{{ include "fraudgate.fullname" .root }}-jobs:18090
{{- end }}
{{- if $v.cases.enabled }}
FRAUDGATE_CONSOLE_CASES_URL: http://{{ include "fraudgate.fullname" .root }}-cases:{{ $v.cases.service.port }}
{{- end }}
{{- with $v.telemetry.traceUrl }}
FRAUDGATE_TRACE_URL: {{ . | quote }}
{{- end }}
{{- with $v.storage.checkpoints }}
FRAUDGATE_CHECKPOINTS_URI: {{ . | quote }}
{{- end }}
{{- if include "fraudgate.hasPolicy" .root }}
FRAUDGATE_POLICY_PATH: /etc/fraudgate/policy
{{- end }}
{{- if $v.apiKeys.secret }}
FRAUDGATE_API_KEYS_PATH: /etc/fraudgate/api-keys/{{ $v.apiKeys.key }}
{{- end }}
{{- if $v.webhooks.secret }}
FRAUDGATE_WEBHOOKS_PATH: /etc/fraudgate/webhooks/{{ $v.webhooks.key }}
{{- end }}
{{- if $v.models.publicKey.secret }}
FRAUDGATE_MODEL_PUBLIC_KEY_PATH: /etc/fraudgate/model-public/{{ $v.models.publicKey.key }}
{{- end }}
{{- range $name, $value := merge (deepCopy .own) $v.settings }}
FRAUDGATE_{{ upper $name }}: {{ if kindIs "float64" $value }}{{ int64 $value | quote }}{{ else }}{{ $value | quote }}{{ end }}
{{- end }}
{{- with include "fraudgate.endpoint" .root }}
AWS_ENDPOINT_URL: {{ . | quote }}
{{- end }}
{{- with $v.storage.region }}
AWS_REGION: {{ . | quote }}
{{- end }}
{{- if $v.storage.allowHttp }}
AWS_ALLOW_HTTP: "true"
{{- end }}
{{- end -}}

{{/* env of a container. Takes {root, component, identity: whether this process is one of several}. */}}
{{- define "fraudgate.env" -}}
envFrom:
  - configMapRef: {name: {{ include "fraudgate.fullname" .root }}-{{ .component }}}
{{- with .root.Values.storage.credentialsSecret }}
  - secretRef: {name: {{ . }}}
{{- end }}
env:
  - {name: HOME, value: /tmp}
  # Numba keeps machine code only where it may write. The gateway's was made with its image.
  - {name: NUMBA_CACHE_DIR, value: {{ if .identity }}/var/cache/fraudgate/kernels{{ else }}/tmp/kernels{{ end }}}
{{- if .identity }}
  # Kafka transactions are fenced by it: no two pods may share it.
  - name: FRAUDGATE_INSTANCE_ID
    valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{- end }}
{{- if and .root.Values.redis.urlSecret.name (not .root.Values.embedded.redis.enabled) }}
  - name: FRAUDGATE_REDIS_URL
    valueFrom: {secretKeyRef: {name: {{ .root.Values.redis.urlSecret.name }}, key: {{ .root.Values.redis.urlSecret.key }}}}
{{- end }}
{{- end -}}

{{/* Files that every component may read: policy, keys, webhooks. Takes the root. */}}
{{- define "fraudgate.fileMounts" -}}
{{- if include "fraudgate.hasPolicy" . }}
- {name: policy, mountPath: /etc/fraudgate/policy, readOnly: true}
{{- end }}
{{- if .Values.apiKeys.secret }}
- {name: api-keys, mountPath: /etc/fraudgate/api-keys, readOnly: true}
{{- end }}
{{- end -}}

{{- define "fraudgate.fileVolumes" -}}
{{- if .Values.policy.files }}
- name: policy
  configMap:
    name: {{ include "fraudgate.fullname" . }}-policy
    items:
{{- range $path, $_ := .Values.policy.files }}
      - {key: {{ replace "/" "--" $path | quote }}, path: {{ $path | quote }}}
{{- end }}
{{- else if .Values.policy.configMap.name }}
- name: policy
  configMap:
    name: {{ .Values.policy.configMap.name }}
    {{- if not .Values.policy.configMap.items }}{{ fail "policy.configMap.items says which key is which file: [{key: policy.yaml, path: policy.yaml}, ...]" }}{{ end }}
    items: {{- toYaml .Values.policy.configMap.items | nindent 6 }}
{{- end }}
{{- if .Values.apiKeys.secret }}
- {name: api-keys, secret: {secretName: {{ .Values.apiKeys.secret }}, defaultMode: 288}}
{{- end }}
{{- end -}}

{{/* Brings models before a pod serves. Takes {root, component, required}. */}}
{{- define "fraudgate.pullFirst" -}}
- name: pull
  image: {{ include "fraudgate.image" (dict "root" .root "image" "export") }}
  imagePullPolicy: {{ .root.Values.images.pullPolicy }}
  args:
    - pull
    - --name={{ .root.Values.models.name }}
    {{- with .root.Values.models.from }}
    - --from={{ . }}
    {{- end }}
    - --wait-s={{ .root.Values.models.waitSeconds }}
    - --or-keep
    {{- if not .required }}
    - --or-without
    {{- end }}
{{ include "fraudgate.pullCommon" . | indent 2 }}
{{- end -}}

{{/* Brings models for as long as a pod runs; also where a person runs commands, for it has the same home. */}}
{{- define "fraudgate.pullBeside" -}}
- name: models
  restartPolicy: Always
  image: {{ include "fraudgate.image" (dict "root" .root "image" "export") }}
  imagePullPolicy: {{ .root.Values.images.pullPolicy }}
  args:
    - pull
    - --name={{ .root.Values.models.name }}
    {{- with .root.Values.models.from }}
    - --from={{ . }}
    {{- end }}
    - --every-s={{ .root.Values.models.everySeconds }}
{{ include "fraudgate.pullCommon" . | indent 2 }}
{{- end -}}

{{- define "fraudgate.pullCommon" -}}
{{ include "fraudgate.env" (dict "root" .root "component" .component) }}
{{ include "fraudgate.containerSecurity" . }}
resources: {{- toYaml .root.Values.models.resources | nindent 2 }}
volumeMounts:
  - {name: home, mountPath: /var/lib/fraudgate}
  - {name: tmp, mountPath: /tmp}
  {{- if .root.Values.models.publicKey.secret }}
  - {name: model-public, mountPath: /etc/fraudgate/model-public, readOnly: true}
  {{- end }}
  {{- include "fraudgate.fileMounts" .root | trim | nindent 2 }}
{{- end -}}

{{- define "fraudgate.pullVolumes" -}}
{{- with .Values.models.publicKey }}
{{- if .secret }}
- {name: model-public, secret: {secretName: {{ .secret }}, items: [{key: {{ .key }}, path: {{ .key }}}], defaultMode: 288}}
{{- end }}
{{- end }}
{{- end -}}

{{/* The tables' volume, where they don't lie on S3. Takes the root. */}}
{{- define "fraudgate.tablesClaim" -}}
{{- default (printf "%s-tables" (include "fraudgate.fullname" .)) .Values.storage.tablesVolume.existingClaim -}}
{{- end -}}

{{- define "fraudgate.claimSpec" -}}
{{- with .storageClass }}
storageClassName: {{ . }}
{{- end }}
resources: {requests: {storage: {{ .size }}}}
{{- end -}}
