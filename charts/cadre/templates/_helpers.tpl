{{/* The name of all objects: RELEASE-operator, unless overridden. */}}
{{- define "cadre.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride }}
{{- else }}
{{- $name := default "operator" .Values.nameOverride }}
{{- if hasSuffix $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{/* Roles without a namespace: two releases of one name in two namespaces are two operators. */}}
{{- define "cadre.clusterName" -}}
{{- printf "%s:%s" .Release.Namespace (include "cadre.fullname" .) }}
{{- end }}

{{/* Labels by which the pods are selected; they never change. Pods of models have the name `cadre`. */}}
{{- define "cadre.selector" -}}
app.kubernetes.io/name: {{ default "cadre-operator" .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "cadre.labels" -}}
{{ include "cadre.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: cadre
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "cadre.image" -}}
{{- $tag := .Values.image.tag }}
{{- if and (not $tag) (not .Values.image.digest) }}
{{- $tag = .Chart.AppVersion }}
{{- end }}
{{- .Values.image.repository }}{{ with $tag }}:{{ . }}{{ end }}{{ with .Values.image.digest }}@{{ . }}{{ end }}
{{- end }}

{{- define "cadre.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "cadre.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* Who the rights are given to. */}}
{{- define "cadre.subject" -}}
- kind: ServiceAccount
  name: {{ include "cadre.serviceAccountName" . }}
  namespace: {{ .Release.Namespace }}
{{- end }}

{{/* The restricted pod security standard, and a read-only root beside it. */}}
{{- define "cadre.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "cadre.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
